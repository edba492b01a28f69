"""The documents are true where a program can tell: links, files, names in the code, commands, messages, tables."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from cast_ray.cli.main import COMMANDS, main
from cast_ray.plan.ablation import load_table
from cast_ray.plan.search import load_search
from cast_ray.recipe import recipe_keys
from cast_ray.recipe.variants import is_variant

ROOT = Path(__file__).parents[2]
MAX_README_BYTES = 9_000
FOLDERS = ("benchmarks", "cast_ray", "cluster", "docs", "examples", "findings", "sweeps", "tests", ".github", ".ci")
"""Folders of the repository: what is named below them in backticks must exist."""
INVENTED = re.compile(r"(^|[/_])(mine|NAME)\b")
"""Names that stand for a file which a reader is about to write."""
HAS_COMMANDS = re.compile(r"cast-ray ([^\s`]+)")
HAS_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAME_IN_FILE = re.compile(r"`([^`\n]+)`\s+in\s+`([\w./]+\.py)`")
IS_NAME = re.compile(r"[A-Za-z_][\w.]*(?<!\.csv)(?<!\.json)(?<!\.html)(?<!\.md)(?<!\.npz)")
HAS_SETTING = re.compile(r"--set ['\"]?([\w.]+)=")


def documents(root: Path) -> list[Path]:
    """Every Markdown file that is about the project, the README first."""
    found = [*root.glob("*.md"), *(root / "docs").rglob("*.md"), *(root / "cluster").rglob("*.md")]
    return sorted(found, key=lambda path: (path != root / "README.md", path))


def without_code(text: str) -> str:
    """The text without fenced blocks and code spans, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    found: set[str] = set()
    for title in re.findall(r"^#+ +(.+)$", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S), flags=re.M):
        anchor = re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", title).lower()).strip().replace(" ", "-")
        number = 0
        while (name := anchor + (f"-{number}" if number else "")) in found:
            number += 1
        found.add(name)
    return found


def broken_links(root: Path) -> Iterator[str]:
    for path in documents(root):
        for link in HAS_LINK.findall(without_code(path.read_text())):
            if link.partition(":")[0] in ("http", "https", "mailto"):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            if not target.exists():
                yield f"{path.relative_to(root)}: {link}: no such file"
            elif anchor and anchor not in anchors_of(target.read_text()):
                yield f"{path.relative_to(root)}: {link}: no such heading"


def missing_paths(root: Path) -> Iterator[str]:
    """Paths in code spans, and words of commands, that look like files of the repository and are not there."""
    starts = "|".join(map(re.escape, FOLDERS))
    looks_like_a_path = re.compile(rf"(?<![\w/.~-])(?:{starts})/[\w./-]*[\w/]")
    for path in documents(root):
        text = path.read_text()
        code = [*re.findall(r"`([^`\n]+)`", text), *re.findall(r"^ *```.*?^ *```", text, flags=re.M | re.S)]
        for named in dict.fromkeys(name for span in code for name in looks_like_a_path.findall(span)):
            if not INVENTED.search(named) and not (root / named).exists():
                yield f"{path.relative_to(root)}: {named}: no such file"


def unknown_words(root: Path) -> Iterator[str]:
    """Commands and recipe keys of `--set` that do not exist."""
    keys = set(recipe_keys())
    for path in documents(root):
        text = path.read_text()
        for command in dict.fromkeys(HAS_COMMANDS.findall(text)):
            if re.fullmatch(r"[a-z]+", command) and command not in COMMANDS:
                yield f"{path.relative_to(root)}: cast-ray {command}: no such command"
        for key in dict.fromkeys(HAS_SETTING.findall(text)):
            if key not in keys and not is_variant(key):
                yield f"{path.relative_to(root)}: --set {key}: no such key"


def missing_names(root: Path) -> Iterator[str]:
    """Names of the code that a document says are in a file, and that are not there.

    These are "`NAME` in `FILE.py`" in sentences, and the plain names in a row of a table that also has files.
    """
    for path in documents(root):
        text = path.read_text()
        said = [(names, [file]) for names, file in NAME_IN_FILE.findall(text)]
        for line in text.splitlines():
            spans = re.findall(r"`([^`]+)`", line) if line.startswith("|") else []
            files = [span for span in spans if span.endswith(".py") and (root / span).is_file()]
            said += [(span, files) for span in spans if files and IS_NAME.fullmatch(span)]
        for name, named in dict.fromkeys((name, tuple(files)) for name, files in said):
            code = "\n".join((root / file).read_text() for file in named if (root / file).is_file())
            if lost := [word for word in re.findall(r"[A-Za-z_]\w*", name) if not re.search(rf"\b{word}\b", code)]:
                yield f"{path.relative_to(root)}: {name}: no {', '.join(lost)} in {', '.join(named)}"


def commands_in(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a document: its name (`store gc` is one), and the options that it is given."""
    code = [*re.findall(r"`([^`\n]+)`", text), *re.findall(r"^ *```.*?^ *```", text, flags=re.M | re.S)]
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|#", line):
            if called := re.search(r"(?:cast-ray|python sweeps/ablate\.py) (\w.*)", part):
                words = called[1].split()
                words = ["ablate", *words] if "sweeps/ablate.py" in part else words
                name = words[:2] if words[0] in ("annotate", "store") else words[:1]
                yield " ".join(name), [word.partition("=")[0] for word in words if word.startswith("--")]


def unknown_options(root: Path, help_of: Callable[[str], str]) -> Iterator[str]:
    """Options that a document gives to a command which does not have them."""
    for path in documents(root):
        for name, options in commands_in(path.read_text()):
            for option in options:
                if name.split()[0] in COMMANDS and not re.search(rf"(?<![\w-]){option}(?![\w-])", help_of(name)):
                    yield f"{path.relative_to(root)}: cast-ray {name} {option}: no such option"


def texts_of(root: Path) -> list[str]:
    """Every text in the code, with `{}` for what is put into it."""
    found: list[str] = []
    for path in sorted((root / "cast_ray").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def untold_messages(root: Path) -> list[str]:
    """Messages that docs/debugging.md explains and that nothing in the code says.

    In the document `...`, a number, a capital letter and a quoted word stand for what varies; the longest of the other
    parts must be in a text of the code. A single word is the name of an exception.
    """
    page = (root / "docs" / "debugging.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page.partition("## Messages")[2], flags=re.M)
    texts = texts_of(root)

    def is_told(message: str) -> bool:
        fixed = max(re.split(r"\.\.\.|\b[A-Z]\b|'[^']*'|\d+", message), key=len).strip()
        return any(fixed in text for text in texts)

    assert messages
    return [message for message in messages if " " in message and not is_told(message)]


def unnamed_tables(root: Path) -> list[str]:
    rows = (root / "docs" / "sweeps.md").read_text().partition("| table | rows |")[2].partition("\n\n")[0]
    return [
        table.stem for table in sorted((root / "sweeps" / "tables").glob("*.yaml")) if f"`{table.stem}`" not in rows
    ]


def unreachable_pages(root: Path) -> list[str]:
    """Pages of docs/ that its index does not link."""
    linked = HAS_LINK.findall(without_code((root / "docs" / "index.md").read_text()))
    return [page.name for page in sorted((root / "docs").glob("*.md")) if page.name not in (*linked, "index.md")]


def test_links_lead_somewhere() -> None:
    assert list(broken_links(ROOT)) == []


def test_named_files_exist() -> None:
    assert list(missing_paths(ROOT)) == []


def test_named_commands_and_recipe_keys_exist() -> None:
    assert list(unknown_words(ROOT)) == []


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """What `cast-ray NAME --help` prints."""

    @cache
    def read(name: str) -> str:
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
        return capsys.readouterr().out

    return read


def test_commands_have_the_options_that_they_are_given(help_of: Callable[[str], str]) -> None:
    assert list(unknown_options(ROOT, help_of)) == []


def test_named_functions_and_fields_are_where_they_are_said_to_be() -> None:
    assert list(missing_names(ROOT)) == []


def test_explained_messages_are_in_the_code() -> None:
    assert untold_messages(ROOT) == []


@pytest.mark.parametrize(("page", "load"), [("sweeps.md", load_table), ("search.md", load_search)])
def test_the_tables_and_searches_that_are_shown_can_be_read(
    page: str, load: Callable[[Path], object], tmp_path: Path
) -> None:
    shown = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / page).read_text(), flags=re.M | re.S)
    assert shown
    for text in shown:
        (tmp_path / "shown.yaml").write_text(text)
        load(tmp_path / "shown.yaml")


def test_every_table_is_described() -> None:
    assert unnamed_tables(ROOT) == []


def test_the_index_has_every_page() -> None:
    assert unreachable_pages(ROOT) == []


def test_the_readme_is_a_first_page() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= MAX_README_BYTES


PLANTED = {
    "a link to a missing file": ("[x](docs/gone.md)", "README.md: docs/gone.md: no such file"),
    "a missing heading": ("[x](docs/index.md#gone)", "README.md: docs/index.md#gone: no such heading"),
    "a missing heading of its own": ("[x](#gone)", "README.md: #gone: no such heading"),
    "a missing module": ("`cast_ray/gone.py`", "README.md: cast_ray/gone.py: no such file"),
    "a missing table": ("`sweeps/tables/gone.yaml`", "README.md: sweeps/tables/gone.yaml: no such file"),
    "a missing script": ("```sh\npython sweeps/gone.py x\n```", "README.md: sweeps/gone.py: no such file"),
    "a name that is not in the file": (
        "Add it to `Gone.build` in\n`cast_ray/there.py`.",
        "README.md: Gone.build: no Gone in cast_ray/there.py",
    ),
    "a name that is not in the files of its row": (
        "| 1 | `cast_ray/there.py` | `gone` is called |",
        "README.md: gone: no gone in cast_ray/there.py",
    ),
    "an unknown command": ("`cast-ray fly DIR`", "README.md: cast-ray fly: no such command"),
    "an unknown key": ("`--set loss.lambda_pix=1`", "README.md: --set loss.lambda_pix: no such key"),
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small repository without a fault."""
    for folder in ("docs", "sweeps/tables", "cast_ray"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "cast_ray" / "there.py").write_text("def build() -> None: ...\n")
    (tmp_path / "sweeps" / "tables" / "losses.yaml").touch()
    (tmp_path / "docs" / "index.md").write_text("# Index\n\n## The `losses`, and more\n\n[s](sweeps.md)\n")
    (tmp_path / "docs" / "sweeps.md").write_text("# Sweeps\n\n| table | rows |\n|---|---|\n| `losses` | all |\n")
    (tmp_path / "README.md").write_text(
        "# First\n\n[a](docs/index.md#the-losses-and-more) [b](#first) [c](https://example.org) `cast_ray/there.py`\n"
        "`build` in `cast_ray/there.py` `cast_ray/mine.py` `[no](link)`\n\n"
        "```sh\ncast-ray ablate losses --set loss.lambda_pxl=1\n```\n"
    )
    return tmp_path


def faults(root: Path) -> list[str]:
    return [*broken_links(root), *missing_paths(root), *missing_names(root), *unknown_words(root)]


def test_a_sound_repository_has_no_fault(repository: Path) -> None:
    assert faults(repository) == unnamed_tables(repository) == unreachable_pages(repository) == []


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_faults_are_found(repository: Path, planted: str) -> None:
    text, fault = PLANTED[planted]
    readme = repository / "README.md"
    readme.write_text(f"{readme.read_text()}\n{text}\n")
    assert faults(repository) == [fault]


def test_planted_options_are_found(repository: Path) -> None:
    readme = repository / "README.md"
    readme.write_text(
        f"{readme.read_text()}\n`cast-ray ablate losses --dry`\n\n```sh\n"
        "cast-ray ablate losses \\\n  --far=1   # --no\npython sweeps/ablate.py losses --dry-run --near\n```\n"
    )
    assert list(unknown_options(repository, lambda name: "--dry-run --set KEY=VALUE")) == [
        f"README.md: cast-ray ablate {option}: no such option" for option in ("--dry", "--far", "--near")
    ]


def test_planted_messages_are_found(repository: Path) -> None:
    (repository / "cast_ray" / "there.py").write_text('raise ValueError(f"{n} of {m} files are bad, above {limit}")\n')
    (repository / "docs" / "debugging.md").write_text(
        "## Messages\n\n| message | meaning |\n|---|---|\n"
        "| `N of M files are bad, above ...` | true |\n| `N files are good` | of another program |\n"
    )
    assert untold_messages(repository) == ["N files are good"]


def test_planted_omissions_are_found(repository: Path) -> None:
    (repository / "sweeps" / "tables" / "gone.yaml").touch()
    (repository / "docs" / "alone.md").write_text("# Alone\n")
    assert unnamed_tables(repository) == ["gone"] and unreachable_pages(repository) == ["alone.md"]
