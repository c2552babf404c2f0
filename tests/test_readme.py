"""README.md and the model cards have the tables of the committed CSV files; README.md links to what is there, and is
short."""

import re

import pytest
import readme_tables
import table_cells
from conftest import ROOT

TEXT = readme_tables.README.read_text(encoding="utf-8")
BLOCKS = {name: content.splitlines() for _, name, content, _ in readme_tables.BLOCK.findall(TEXT)}


def test_every_table_that_can_be_generated_has_a_place():
    assert list(BLOCKS) == list(readme_tables.TABLES)


@pytest.mark.parametrize("name", readme_tables.TABLES)
def test_the_table_is_what_the_csv_files_give(name):
    assert BLOCKS[name] == readme_tables.TABLES[name](), "run python tests/readme_tables.py"


OTHERS = [(file, name) for file, tables in (readme_tables.MORE | readme_tables.CARDS).items() for name in tables]


@pytest.mark.parametrize(("file", "name"), OTHERS, ids=lambda part: str(part).replace(str(ROOT), ""))
def test_a_table_of_another_file_is_what_the_csv_files_give(file, name):
    blocks = {name: content for _, name, content, _ in readme_tables.BLOCK.findall(file.read_text(encoding="utf-8"))}
    made = (readme_tables.MORE | readme_tables.CARDS)[file]
    assert list(blocks) == list(made)
    assert blocks[name].splitlines() == made[name](), "run python tests/readme_tables.py"


def test_a_table_takes_the_rows_of_the_last_commit_on_each_device(tmp_path, monkeypatch):
    lines = "device,commit,ms", "A,old,1", "B,old,2", "A,new,3", "A,new,4"
    (tmp_path / "some.csv").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(table_cells, "ROOT", tmp_path)
    assert [row["ms"] for row in table_cells.read("some.csv", "device")] == ["2", "3", "4"]


@pytest.mark.parametrize(("device", "column"), [
    ("AMD EPYC (AVX2), 2 threads", "AVX2"), ("Intel(R) Xeon(R) (AVX512 with bf16), 1 threads", "AVX-512 with bf16"),
    ("AMD EPYC (avx512_bf16)", "AVX-512 with bf16"), ("avx2", "AVX2"), ("NVIDIA H200", "NVIDIA H200"),
])  # fmt: skip
def test_devices_are_told_apart_by_their_instructions(device, column):
    assert table_cells.instruction_set(device) == column


def test_it_can_be_read_at_once():
    assert len(TEXT.splitlines()) <= 220


def test_every_local_link_and_picture_exists():
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", TEXT)
    local = {link or picture for link, picture in links if not (link or picture).startswith(("http", "#"))}
    assert len(local) > 20
    assert sorted(link for link in local if not (ROOT / link).exists()) == []


def test_the_table_of_the_package_has_a_line_for_each_module():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| .", (ROOT / "models/README.md").read_text(encoding="utf-8"), re.MULTILINE)
    modules = {path.relative_to(ROOT / "models").as_posix() for path in (ROOT / "models").rglob("*.py")}
    assert sorted(rows) == sorted(name for name in modules if not name.endswith("/__init__.py"))


def test_the_walkthrough_shows_every_script():
    commands = set(re.findall(r"^python (\w+\.py) ", TEXT, re.MULTILINE))
    assert commands == {path.name for path in ROOT.glob("*.py")}


def test_every_flag_is_one_that_a_script_has():
    flags = set(re.findall(r"`[^`\n]*?(--[a-z][a-z0-9-]+)", TEXT)) - {"--help", "--max-restarts", "--nproc-per-node"}
    scripts = [*ROOT.glob("*.py"), ROOT / "models/cli.py", ROOT / "models/phantom.py"]
    code = "".join(path.read_text(encoding="utf-8") for path in scripts)
    negated = re.findall(r'"--([a-z0-9-]+)", action=argparse.BooleanOptionalAction', code)
    known = {*re.findall(r'"(--[a-z0-9-]+)"', code), *(f"--no-{name}" for name in negated)}
    assert flags - known == set()
