"""Test README and docs: Python blocks run, shell commands parse, and links and included files exist."""

import ast
import contextlib
import inspect
import io
import itertools
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from sparing.cli import app
from sparing.methods import METHODS
from sparing.run.recipe import build_recipe, load_recipe
from sparing.run.sweep_file import load_sweep

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.joinpath("docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
METHOD_FILES = sorted({Path(inspect.getfile(method)) for method in METHODS.values()})
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SHELL = ("", "sh", "bash", "shell", "console", "text")
INDENTED = re.compile(r"^(?: {4}|\t)(.*)$", re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
COMMAND = re.compile(r"(?:^|\s)(?:[\w./]*/)?sparing\s+(?=[\w-])")
SHELL_LINE = re.compile(r"(?:\$ )?(?:\w+=\S* )*(?:torchrun |(?:[\w./]*/)?sparing )")


def page_name(path):
    return path.relative_to(ROOT).as_posix()


# Their blocks import frameworks or train for a while: tests/test_pages.py runs them.
SLOW_PAGES = [
    *sorted(ROOT.joinpath("docs", "tutorials").glob("*.md")),
    *(ROOT / "docs" / f"{name}.md" for name in ("distributed", "quantization", "recipes", "sparse_models")),
]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in SLOW_PAGES], ids=page_name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


def run_blocks(page):
    """Run the Python blocks of a page, one after the other, and return their names."""
    text = page.read_text()
    namespace = {}
    for match in BLOCK.finditer(text):
        # Pad with empty lines, so that an error points at the line of the page.
        line = text.count("\n", 0, match.start(1))
        exec(compile("\n" * line + match.group(1), str(page), "exec"), namespace)
    return namespace


def test_the_readme_has_a_python_block():
    assert BLOCK.search((ROOT / "README.md").read_text())


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_link_targets_exist(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


SNIPPET = re.compile(r'--8<-- "([^":]+)')


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_included_files_exist(page):
    text = page.read_text()
    # A Markdown formatter may add spaces to the include mark, and then nothing is included.
    assert "8 <" not in text
    for target in SNIPPET.findall(text):
        assert (ROOT / target).is_file()


@pytest.mark.parametrize("path", METHOD_FILES, ids=lambda path: path.stem)
def test_every_method_has_a_page_that_includes_its_code(path):
    page = (ROOT / "docs" / "methods" / f"{path.stem}.md").read_text()
    assert f'--8<-- "src/sparing/methods/{path.name}"' in page
    assert f"methods/{path.stem}.md" in (ROOT / "mkdocs.yml").read_text()
    assert f"methods/{path.stem}.md" in (ROOT / "README.md").read_text()


def commands(text):
    """Yield each `sparing` command of a page, and whether it may leave out required arguments.

    Commands in prose and commands with "..." may leave them out.
    """
    for language, block in FENCE.findall(text):
        if language in SHELL:
            yield from ((command, "..." in command) for line in block.split("\n") for command in split(line))
    text = FENCE.sub("", text)
    for line in INDENTED.findall(text):
        yield from ((command, "... " in f"{command} ") for command in split(line))
    for code in INLINE.findall(INDENTED.sub("", text)):
        yield from ((command, True) for command in split(" ".join(code.split())))


def split(line):
    """Return the `sparing` commands in a line, without the word sparing. A line that is no shell line has none."""
    if not SHELL_LINE.match(line):
        return []
    return [command.strip() for command in COMMAND.split(line.replace("\\|", "|"))[1:]]  # tables escape |


def argument_lists(command):
    """Return the argument lists that a command stands for.

    `[...]` is an optional part, `a|b` stands for two arguments, `show X | list` for two subcommands, and a word in
    capitals is a placeholder.
    """
    first, *others = re.split(r"\s\|\s", command)
    group = first.split()[0]
    alternatives = [first, *(f"{group} {other}" for other in others if group == "budget")]
    lists = []
    for alternative in alternatives:
        required = re.sub(r"\[(-[^\]]*)\](\.\.\.)?", r"\1", alternative)
        words = [word for word in shlex.split(required, comments=True) if word != "..."]
        words = list(itertools.takewhile(lambda word: not re.fullmatch(r"&&|;|\d?>+|&", word), words))
        choices = [["1"] if re.fullmatch(r"[A-Z]+", word) else choices_of(word) for word in words]
        lists += map(list, itertools.product(*choices))
    return lists


def choices_of(word):
    return word.split("|") if re.fullmatch(r"\w+(\|\w+)+", word) else [word]


def parse(arguments):
    """Parse arguments with the real command line, without running the command.

    Returns:
        The error message, "" if there is none.

    Raises:
        InputError: a recipe or sweep of this repository is not valid, or does not accept the --set changes.
    """
    root = typer.main.get_command(app)
    for name, command in itertools.chain(root.commands.items(), root.commands["budget"].commands.items()):
        if not hasattr(command, "commands"):
            command.callback = check_sweep if name == "sweep" else check_recipe
    message = io.StringIO()
    with contextlib.redirect_stderr(message), pytest.raises(SystemExit) as end:
        root.main(arguments, prog_name="sparing")
    assert bool(end.value.code) == bool(message.getvalue())
    return " ".join(message.getvalue().split())


def check_recipe(recipe=None, set_=None, **others):
    if recipe is not None and recipe.parts[0] == "recipes":
        load_recipe(ROOT / recipe, set_ or [])


def check_sweep(sweep, **others):
    if sweep.parts[0] == "recipes":
        load_sweep(ROOT / sweep)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=page_name)
def test_sparing_commands_parse(page):
    for command, partial in commands(page.read_text()):
        for arguments in argument_lists(command):
            error = parse(arguments)
            if partial and re.search("Missing (argument|option|command)|Usage: sparing budget", error):
                continue
            assert not error, f"{page.name}: sparing {command}: {error}"


YAML_BLOCK = re.compile(r"^```yaml\n((?!--8<--).*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if YAML_BLOCK.search(page.read_text())], ids=page_name)
def test_yaml_blocks_are_parts_of_recipes(page):
    rest = yaml.safe_load((ROOT / "recipes" / "mnist5k" / "demo.yaml").read_text())
    for block in YAML_BLOCK.findall(page.read_text()):
        build_recipe({**rest, **yaml.safe_load(block)})


def test_the_readme_names_every_command(capsys):
    root = typer.main.get_command(app)
    expected = {name for name in root.commands if name != "budget"}
    expected |= {f"budget {name}" for name in root.commands["budget"].commands}
    named = set()
    for command, _ in commands((ROOT / "README.md").read_text()):
        for arguments in argument_lists(command):
            named.add(" ".join(arguments[: 2 if arguments[0] == "budget" else 1]))
    assert named == expected
    for command in expected:
        assert parse([*command.split(), "--help"]) == ""
        assert f"Usage: sparing {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("explode RUN", "No such command 'explode'"),
        ("budget | shrink NAME", "No such command 'shrink'"),
        ("train RECIPE [--sett key=value]...", "No such option: --sett"),
        ("export RUN --to onnx|tflite", "'tflite' is not one of"),
        ("train RECIPE --stop-after soon", "Invalid value for '--stop-after'"),
        ("export RUN", "Missing option '--to'"),
        ("eval", "Missing argument"),
        ("methods gmp now", "unexpected extra argument"),
    ],
)
def test_a_wrong_command_does_not_parse(command, error):
    assert any(error in parse(arguments) for arguments in argument_lists(command))


def test_commands_are_found_in_blocks_and_prose():
    page = """
Use `sparing
bench RUN`, not `from sparing import x`.

    torchrun --no-python sparing train recipe.yaml   # a comment
    sparing budget list | show NAME     .venv/bin/sparing methods > file
    examples/       sparing in your own loop

```text
sparing eval ...
```
```python
sparing train = 1
```
"""
    found = [(argument_lists(command), partial) for command, partial in commands(page)]
    assert found == [
        ([["eval"]], True),
        ([["train", "recipe.yaml"]], False),
        ([["budget", "list"], ["budget", "show", "1"]], False),
        ([["methods"]], False),
        ([["bench", "1"]], True),
    ]


def literals(path):
    """Yield the string literals of a file except docstrings, with a null character for each value of an f-string."""
    tree = ast.parse(path.read_text())
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield node.value


@pytest.mark.slow
def test_the_messages_in_the_faq_exist():
    source = [text for path in ROOT.joinpath("src").rglob("*.py") for text in literals(path)]
    page = (ROOT / "docs" / "faq.md").read_text()
    quoted = re.findall(r"^### (.+)", page[page.index("## Errors") : page.index("## Results")], re.MULTILINE)
    assert len(quoted) >= 10
    for message in quoted:
        # The length of a run is written "steps=..." in a message, too.
        parts = re.split(r"(?<!steps=)\.\.\.|\bN\b", message)
        pattern = ".+".join(map(re.escape, parts))
        assert any(re.search(pattern, text) for text in source), f"no message of the package reads {message!r}"
