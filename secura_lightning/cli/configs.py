"""``secura configs``: list the configurations that come with the package, and copy one to start from."""

from __future__ import annotations

import argparse
from difflib import get_close_matches
from pathlib import Path

from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.study.axes import SHIPPED
from secura_lightning.study.settings import write_text


def main(args: list[str]) -> int:
    """List, or copy.

    Raises:
        ConfigError: There is no such configuration.
        SecuraError: The destination exists.
    """
    parser = argparse.ArgumentParser(prog="secura configs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="ls | cp")
    commands.add_parser("ls", help="names, with what each does")
    copy = commands.add_parser("cp", help="copy one")
    copy.add_argument("name", help="as `secura configs ls` prints it")
    copy.add_argument("dest", nargs="?", type=Path, default=Path(), help="file or folder (here)")
    copy.add_argument("--force", action="store_true", help="overwrite")
    options = parser.parse_args(args)
    found = available()
    if options.command == "ls":
        width = max(map(len, found))
        for name, path in found.items():
            print(f"{name:<{width}}  {what(path)}")
        return 0
    name = options.name.removesuffix(".yaml").removeprefix("configs/")
    if name not in found:
        near = get_close_matches(name, found, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "; `secura configs ls` lists them"
        raise ConfigError(f"no configuration '{options.name}'{hint}")
    target = options.dest
    if target.is_dir() or target.suffix not in (".yaml", ".yml"):
        target = target / found[name].name
    if target.exists() and not options.force:
        raise SecuraError(f"{target} exists; name another file, or add --force")
    write_text(target, found[name].read_text(encoding="utf-8"))
    print(f"wrote {target}")
    return 0


def available() -> dict[str, Path]:
    """The shipped configurations by name: their path below ``configs`` without ``.yaml``.

    Raises:
        SecuraError: The package was installed without them.
    """
    found = {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in sorted(SHIPPED.rglob("*.yaml"))}
    if not found:
        raise SecuraError(f"{SHIPPED} holds no configurations; reinstall the package")
    return dict(sorted(found.items(), key=lambda item: ("/" in item[0], item[0])))


def what(path: Path) -> str:
    """The text after ``# What:`` in a file's head."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# What:"):
            return line.removeprefix("# What:").strip()
    return ""
