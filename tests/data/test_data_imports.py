import subprocess
import sys

SCRIPT = """
import sys
import lightning.pytorch  # imports some of them by itself
heavy = ("sklearn", "torchvision", "PIL", "matplotlib")
before = {name for name in heavy if name in sys.modules}
import softgen.data
print(sorted({name for name in heavy if name in sys.modules} - before), "sklearn" in sys.modules)
"""


def test_importing_the_package_imports_nothing_heavy() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] False"
