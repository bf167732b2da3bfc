"""What the documents say is so: their examples run, and their links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import engine

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")]
WITH_EXAMPLES = [
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for package in ("engine", "kvstore")
    for path in sorted(ROOT.glob(f"{package}/**/*.py"))
    if ">>> " in path.read_text()
]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(module))
    engine.close()  # they use the default one
    assert result.attempted and not result.failed


def test_the_ten_lines_of_the_readme(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    whole = [block for block in blocks if "import kvstore" in block]
    assert len(whole) == 1
    exec(compile(whole[0], "README.md", "exec"), {})
    momentum = weight = 0.0
    for _ in range(10):
        momentum = 0.9 * momentum + 1
        weight -= 0.1 * momentum
    printed = [float(number) for number in capsys.readouterr().out.strip("[]\n ").split()]
    assert printed == pytest.approx([weight] * 3, rel=1e-5)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_to_files(document):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target
