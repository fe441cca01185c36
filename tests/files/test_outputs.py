"""Nothing of anybody else's is lost: what may be written where is decided before work begins."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

from loraloom.errors import LoraloomError
from loraloom.files.atomic import staged_folder
from loraloom.files.outputs import RECORD, check_apart, check_file, check_folder

NOBODY = 65534  # a user who owns nothing


def result(path: Path, kind: str = "merged adapter") -> Path:
    with staged_folder(path, kind=kind) as folder:
        (folder / "weights").write_text("x")
        (folder / "heads").mkdir()
        (folder / "heads" / "one").write_text("x")
    return path


def check(path: Path, kind: str = "merged adapter", *, overwrite: bool = True, inputs: tuple[Path, ...] = ()) -> None:
    check_folder(path, kind=kind, overwrite=overwrite, inputs=inputs)


@pytest.mark.parametrize("record", ["meta.json", "stage.json", "loraloom.json", RECORD])
@pytest.mark.parametrize(
    "content", ["{}", '{"kind": "merged adapter"}', '{"kind": "merged adapter", "files": []}', "[" * 10_000, "\x00"]
)
def test_a_folder_is_not_ours_because_it_holds_a_file_of_some_name(tmp_path: Path, record: str, content: str) -> None:
    (tmp_path / "mine" / "src").mkdir(parents=True)
    (tmp_path / "mine" / "src" / "thesis.txt").write_text("years of work")
    (tmp_path / "mine" / record).write_text(content)
    with pytest.raises(LoraloomError, match=r"mine: .*src/thesis.txt.* not ours and would be lost"):
        check(tmp_path / "mine")


def test_new_and_empty_folders_are_free(tmp_path: Path) -> None:
    check(tmp_path / "new" / "deep", overwrite=False)
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    check(tmp_path / "empty", overwrite=False)


def test_an_earlier_result_is_replaced_only_when_asked_for(tmp_path: Path) -> None:
    result(tmp_path / "out")
    with pytest.raises(LoraloomError, match="holds an earlier result") as error:
        check(tmp_path / "out", overwrite=False)
    assert "--overwrite" in error.value.hint
    check(tmp_path / "out")
    with pytest.raises(LoraloomError, match="a result of another kind, merged adapter"):
        check(tmp_path / "out", "trained adapter")


def test_foreign_files_in_a_result_are_named(tmp_path: Path) -> None:
    out = result(tmp_path / "out")
    (out / "NOTES.md").write_text("x")
    with pytest.raises(LoraloomError, match=r"out: NOTES.md is not ours"):
        check(out)
    for name in ("a", "b", "c"):
        (out / "heads" / name).write_text("x")
    with pytest.raises(LoraloomError, match=r"NOTES.md, heads/a, heads/b and 1 more are not ours"):
        check(out)


def test_links_and_folders_of_others_count_as_files(tmp_path: Path) -> None:
    out = result(tmp_path / "out")
    (out / "empty").mkdir()  # nothing to lose
    check(out)
    (tmp_path / "data").mkdir()
    (out / "data").symlink_to(tmp_path / "data")
    with pytest.raises(LoraloomError, match="data is not ours"):
        check(out)


def test_what_cannot_be_listed_is_not_ours() -> None:
    with tempfile.TemporaryDirectory() as place:
        out = result(Path(place) / "out")
        (out / "heads").chmod(0)
        user = os.geteuid()
        if user == 0:  # who may list everything
            for path in (place, out, out / "heads"):
                os.chown(path, NOBODY, -1)
            os.seteuid(NOBODY)
        try:
            with pytest.raises(LoraloomError, match="Permission denied"):
                check(out)
        finally:
            os.seteuid(user)
            (out / "heads").chmod(0o700)


def test_a_folder_where_the_record_tells_of_more_than_is_there_is_ours(tmp_path: Path) -> None:
    out = result(tmp_path / "out")
    (out / "heads" / "one").unlink()
    check(out)
    assert json.loads((out / RECORD).read_text()) == {"kind": "merged adapter", "files": ["heads/one", "weights"]}


def test_inputs_stay_as_they_are(tmp_path: Path) -> None:
    given = result(tmp_path / "runs" / "a")
    cases = {
        given: "is an input",
        tmp_path / "runs" / ".." / "runs" / "a": "is an input",
        given / "merged": "lies inside the input",
        tmp_path / "runs": "holds the input",
    }
    (tmp_path / "link").symlink_to(given)
    cases[tmp_path / "link"] = "is an input"
    cases[tmp_path / "link" / "deep" / "er"] = "lies inside the input"
    for path, told in cases.items():
        with pytest.raises(LoraloomError, match=told):
            check(path, inputs=(given,))
    check(tmp_path / "runs" / "ab", inputs=(given, tmp_path / "absent"))
    check_apart(tmp_path / "runs", [given], may_hold=True)
    with pytest.raises(LoraloomError, match="lies inside"):
        check_apart(given / "study", [given], may_hold=True)


def test_a_relative_place_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(result(tmp_path / "a"))
    for path in (Path("."), Path("../a")):
        with pytest.raises(LoraloomError, match="is an input"):
            check(path, inputs=(tmp_path / "a",))


def test_a_file_is_replaced_only_where_it_is_one_of_ours(tmp_path: Path) -> None:
    mine, ours = tmp_path / "mine.html", tmp_path / "ours.html"
    mine.write_text("<html>thesis</html>")
    ours.write_text("<html><!-- made by loraloom --></html>")
    for path in (mine, ours):
        with pytest.raises(LoraloomError, match="is there already"):
            check_file(path, mark=b"made by loraloom")
    with pytest.raises(LoraloomError, match=r"mine.html: is not ours"):
        check_file(mine, mark=b"made by loraloom", overwrite=True)
    check_file(ours, mark=b"made by loraloom", overwrite=True)
    check_file(tmp_path / "new", mark=b"made by loraloom")
    with pytest.raises(LoraloomError, match="is an input"):
        check_file(ours, overwrite=True, inputs=[ours])
    with pytest.raises(LoraloomError, match="is a folder, where a file"):
        check_file(tmp_path, overwrite=True)


def test_a_file_is_no_place_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoraloomError, match="is a file, where a folder"):
        check(tmp_path / "file")


def test_a_place_where_nothing_can_be_made_is_told_before_work_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    for check_one in (check, check_file):
        with pytest.raises(LoraloomError, match=r"file is a file, no folder"):
            check_one(tmp_path / "file" / "deep" / "out")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for check_one in (check, check_file):
        with pytest.raises(LoraloomError, match=f"{tmp_path} may not be written to"):
            check_one(tmp_path / "new" / "out")
    check_file(Path("/dev/null"))
