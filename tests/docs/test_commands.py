"""Every command that the documentation and the configurations' headers show is one that works.

All of them are parsed, with every option and key checked, and the guide is followed from an empty folder to its end.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from secura_lightning.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "REPRODUCIBILITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
HEADERS = sorted((ROOT / "configs").rglob("*.yaml"))
GUIDE = ROOT / "docs" / "guide.md"

START = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:\S*/)?(?:secura|(?:torchrun|srun) .*?(?:-m secura_lightning|secura)) (.*)$")
STANDS_FOR = {"C.yaml": "configs/quickstart.yaml", "A.yaml": "configs/quickstart.yaml", "LR": "1e-3",
              "overlay.yaml": "configs/overlays/cpu.yaml"}  # fmt: skip
"""Placeholders of the documentation, and what takes their place."""


def fences(text: str, language: str) -> Iterator[str]:
    """Blocks of code of one language, with continued lines joined."""
    for found in re.finditer(rf"^```{language}\n(.*?)^```", text, re.S | re.M):
        yield found[1].replace("\\\n", " ")


def shown(path: Path) -> Iterator[str]:
    """The lines and code spans of a page, or of a configuration's header, that are a command with an option."""
    text = path.read_text()
    if path.suffix == ".yaml":
        comments = [line[2:] for line in text.splitlines(keepends=True) if line.startswith("# ")]
        head = "".join(comments).replace("\\\n", " ")
        lines = re.findall(r"^(?:Run|Try|Then|See|What):\s+(.*)$", head, re.M)
    else:
        blocks = "\n".join(fences(text, "bash"))
        lines = [part for line in blocks.splitlines() for part in line.split(" && ")]
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
        lines += [span.replace("\n", " ") for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
    for line in lines:
        found = START.match(re.sub(r"\s+(#|\(|  ).*$", "", line.strip()))
        if found and found[1].split()[0] in COMMANDS and len(found[1].split()) > 2 and "--help" not in found[1]:
            yield found[1]


def cases() -> list[object]:
    """Every distinct command of every page, by page; those of configurations, which other tests fit, run later."""
    return [
        pytest.param(
            path, line, id=f"{path.relative_to(ROOT)}: {line}", marks=pytest.mark.slow if path in HEADERS else ()
        )
        for path in [*PAGES, *HEADERS]
        for line in dict.fromkeys(shown(path))
    ]


@cache
def options(command: str) -> frozenset[str]:
    """The options that a command's help names."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return frozenset(re.findall(r"(?<![\w-])--?[a-z][\w.-]*", told.getvalue()))


def test_the_pages_show_commands() -> None:
    found = {shlex.split(line)[0] for path in [*PAGES, *HEADERS] for line in shown(path)}
    assert found == set(COMMANDS), "a command without an example, or an example without a command"


def test_outputs_are_no_commands(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`secura eval --config A`\n\n```bash\nsecura fit --config B\n```\n\n```text\nsecura fit --config C\n"
        "try `secura fit --config D`\n```\n"
    )
    assert set(shown(page)) == {"eval --config A", "fit --config B"}


@pytest.mark.parametrize(("path", "line"), cases())
def test_command_has_these_options(
    path: Path, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    command, *arguments = [STANDS_FOR.get(word, word) for word in shlex.split(line)]
    files = [Path(word) for word in arguments if word.endswith(".yaml")]
    if command != "fit" or not all(file.exists() for file in files):
        given = {word.split("=")[0] for word in arguments if re.match(r"--?[a-z]", word) and "." not in word}
        assert given <= options(command)
        return
    try:
        code = main([command, *arguments, "--print_config"])
    except SystemExit as end:
        code = end.code or 0
    assert code == 0, capsys.readouterr().err


def write_files(page: str, folder: Path) -> None:
    """Write every block that follows a line of the form `` `name` ...: `` as the guide's reader would."""
    for name, content in re.findall(r"^`([\w./-]+)`[^\n]*:\n\n```(?:json|yaml)\n(.*?)^```", page, re.S | re.M):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def plain(line: str) -> str:
    """A line of output without what differs from run to run: figures, the widths of columns, the bars of histograms."""
    line = re.sub(r"[-+±]?\d[\d.,]*(?:e[-+]?\d+)?", "0", line)
    return re.sub(r"-{2,}", "--", re.sub(r"#+|\s+", " ", line)).strip()


def missing(page: str, printed: str) -> list[str]:
    """Lines of the page's output blocks that were not printed, in that order; ``...`` stands for what was left out."""
    found = iter([plain(line) for line in re.split(r"[\r\n]", printed)])
    lines = [line for block in fences(page, "text") for line in block.splitlines() if line.strip() not in ("", "...")]

    def comes(line: str) -> bool:  # reads on from where the last line was found
        head, cut, _ = line.partition(" ...")
        return any(other.startswith(plain(head)) if cut else other == plain(head) for other in found)

    return [line for line in lines if not comes(line)]


def test_outputs_are_compared_without_their_figures() -> None:
    page = "```text\nrows      5 training\n...\n-----\nAP 0.167   BWT ...\n```\n```text\nwrote merged\n```\n"
    assert missing(page, "rows 12 training\nother\n--------\nAP 1.0  BWT 0.000\nbar\rwrote merged\n") == []
    assert missing(page, "rows 12 trained\n--\nAP 1.0  BWT 0.000\nwrote merged\n")[0] == "rows      5 training"
    assert missing(page, "rows 12 training\n--\nAP 1.0  AIA 0.000\nwrote merged\n")[0] == "AP 0.167   BWT ..."
    assert missing(page, "wrote merged\nrows 12 training\n--\nAP 1.0  BWT 0.000\n") == ["wrote merged"]


@pytest.mark.slow
def test_the_guide_works_as_written(tmp_path: Path) -> None:
    page = GUIDE.read_text()
    write_files(page, tmp_path)
    assert {path.name for path in tmp_path.rglob("*.*")} == {
        "tickets.yaml", "grid.yaml", "train.jsonl", "test.jsonl", "faq.jsonl",
    }  # fmt: skip
    lines = [line for block in fences(page, "bash") for line in block.splitlines() if "tensorboard" not in line]
    assert len(lines) > 15
    script = "set -eux -o pipefail\n" + "\n".join(lines)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**os.environ, "PATH": path}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    for file in ("merged/model.safetensors", "adapter/adapter.safetensors", "adapter-peft/adapter_model.safetensors"):
        assert (tmp_path / file).exists(), file
    assert list((tmp_path / "figures").iterdir())
    report = tmp_path / "lightning_logs/tickets/version_0/continual.json"
    assert report.exists()
    assert missing(page, run.stdout) == []
