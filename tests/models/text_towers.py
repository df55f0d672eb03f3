"""A tiny CLIP text tower with its tokenizer, saved as transformers saves them."""

from pathlib import Path

WORDS = ("a", "red", "dog", "cat", "circle", "ring", "and", "worst", "quality")
LENGTH = 7


def save_tokenizer(folder: Path, *, pad: str = "<end>") -> int:
    """Write a tokenizer of whole words; returns its number of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # As in CLIP, the end has the largest id.
    words = ("<pad>", "<unk>", "<start>", *WORDS, "<end>")
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[("<start>", vocabulary["<start>"]), ("<end>", vocabulary["<end>"])],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token=pad, model_max_length=LENGTH
    ).save_pretrained(folder)
    return len(vocabulary)


def save_clip_text(
    folder: Path, *, tokenizer_folder: Path | None = None, width: int = 16, hidden_act: str = "gelu"
) -> Path:
    """Write a CLIP text tower with random weights, and its tokenizer, beside it or elsewhere; returns the folder."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    rows = save_tokenizer(folder if tokenizer_folder is None else tokenizer_folder)
    torch.manual_seed(11)
    config = CLIPTextConfig(
        vocab_size=rows,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        eos_token_id=rows - 1,
        hidden_act=hidden_act,
    )
    model = CLIPTextModelWithProjection(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder
