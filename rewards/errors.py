"""Words for errors that come from elsewhere."""


def one_line(error: BaseException, *, limit: int = 300) -> str:
    """The message of an error folded into one line of at most `limit` characters; without one, the error's type."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
