"""The rules of the house that can be read from the code: floors, sizes, paragraphs, one statement a line."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted((ROOT / "rlhf").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
# A room imports from lower floors, and from itself.
FLOORS = (
    ("ppo", "baichuan", "flags", "flags_page", "artefacts"),
    ("run",),
    ("data", "models"),
    ("arguments", "endings", "reward", "compare"),
    ("cost",),
    ("rl", "trainer", "page"),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Lower rooms on the same floor that a room may look into: data is encoded before a model runs.
NEIGHBOURS = {
    ("artefacts", "flags"), ("flags", "flags_page"), ("flags_page", "flags"), ("data", "models"), ("models", "data"),
    ("reward", "arguments"), ("reward", "endings"),
}  # fmt: skip


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "rlhf").parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of rlhf/ that a file imports, inside functions too."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("rlhf.")}
    return rooms


def functions(path: Path) -> list[tuple[ast.FunctionDef, list[str]]]:
    """Each function of a file with the lines of its body, its docstring aside."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            start = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
            found.append((node, lines[start : node.end_lineno]))
    return found


@pytest.mark.parametrize(
    "path", [path for path in ROOMS if path.parent != ROOT / "rlhf" or path.name != "__init__.py"]
)
def test_a_room_imports_downwards_only(path):
    room = room_of(path)
    above = {
        other
        for other in imported_rooms(path)
        if other != room and FLOOR_OF[other] >= FLOOR_OF[room] and (room, other) not in NEIGHBOURS
    }
    assert not above, f"{path.relative_to(ROOT)} imports {above}"


@pytest.mark.parametrize("path", ROOMS)
def test_a_file_of_a_room_can_be_read_in_one_go(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 280


@pytest.mark.parametrize(("script", "limit"), [("sft_training", 270), ("reward_modeling", 360), ("rl_training", 360)])
def test_a_stage_script_can_be_read_in_one_go(script, limit):
    assert len((ROOT / f"{script}.py").read_text(encoding="utf-8").splitlines()) <= limit


def test_no_script_imports_another():
    names = {path.stem for path in SCRIPTS}
    for path in SCRIPTS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & names


def test_long_functions_have_paragraphs():
    long = [(node, body) for path in [*ROOMS, *SCRIPTS] for node, body in functions(path)]
    long = [(node, body) for node, body in long if node.end_lineno - node.lineno + 1 >= 18]
    dense = [node.name for node, body in long if not any(not line.strip() or "#" in line for line in body)]
    assert len(dense) <= 0.1 * len(long), dense


@pytest.mark.parametrize("path", [*ROOMS, *SCRIPTS])
def test_no_value_is_called_by_how_it_was_come_by(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "found" not in names


def is_comment(line: str) -> bool:
    """Return True for a comment that is for a reader: no heading of a section, no mark for a tool."""
    said = line.strip()
    return said.startswith("#") and not said.startswith(("# ----", "# noqa", "# fmt"))


def test_the_code_says_why():
    lines = [line for path in [*ROOMS, *SCRIPTS] for line in path.read_text(encoding="utf-8").splitlines()]
    comments = sum(map(is_comment, lines))
    assert comments >= 0.08 * len(lines), f"{comments} comments on {len(lines)} lines"


def test_a_line_holds_one_statement():
    lines, tuples = 0, 0
    for path in [*ROOMS, *SCRIPTS]:
        text = path.read_text(encoding="utf-8")
        lines += len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
                tuples += isinstance(node.targets[0], ast.Tuple)
    assert tuples <= 3 * lines / 1000


def test_a_comprehension_has_one_for():
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for path in [*ROOMS, *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds):
                assert len(node.generators) == 1, f"{path.relative_to(ROOT)}:{node.lineno}"
