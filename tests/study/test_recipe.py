"""A recipe tells every fault at once, takes its paths from its own folder, and those shipped run as they stand."""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
import tiny_study
from loraloom.errors import LoraloomError
from loraloom.study.recipe import InitSettings, Recipe, slug
from loraloom.tasks.files import FileTask
from loraloom.tasks.glue import GlueTask

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))
DATA = Path(__file__).parents[3] / "shared" / "data" / "glue"


def fault(**changes: Any) -> str:
    with pytest.raises(LoraloomError) as told:
        Recipe.parse(tiny_study.recipe(**changes), "r.yaml")
    return str(told.value)


def test_every_fault_is_told_at_once() -> None:
    told = fault(
        tasks={
            "a": {"sorce": "glue"},
            "b/x": {"source": "glue"},
            "glue": {"source": "glue", "pth": 1},
            "c": {"source": "gleu"},
            "files": {"source": "files", "train": "x", "test": "y", "text": ["a", "b", "c"], "labels": [True, 1]},
        },
        lora={"targets": []},
        statistics={"rows": "sample"},
        training={"epocs": 1, "epochs": 0},
        inits={"lora": {"rule": "osmr", "rank": 1}},
        merging=[{"rule": "tiess", "scales": []}, {"rule": "ties", "scales": [float("nan")], "options": {"densty": 1}}],
        sedes=[1],
    )
    expected = [
        "tasks.a: needs `source`: builtin, glue, files",
        "tasks.b/x: a task's name is letters",
        "tasks.glue.pth: unknown option; did you mean 'path'",
        "tasks.c.source: 'gleu' is unknown; did you mean 'glue'",
        "tasks.files.text: List should have at most 2 items",
        "tasks.files.labels.0: Input should be a valid string; put it in quotes",
        "lora.targets: Value should have at least 1 item",
        "statistics.rows: unknown option; did you mean 'kind'?",
        "training.epocs: unknown option; did you mean 'epochs'",
        "training.epochs: Input should be greater than or equal to 1 (given 0)",
        "inits.lora.rule: subspace rule 'osmr' is unknown; did you mean 'osrm'",
        "inits.lora.rank: unknown option; known: description, energy_share",
        "merging.0.rule: no merging rule is called 'tiess'; did you mean 'ties'",
        "merging.0.scales: List should have at least 1 item",
        "merging.1.scales.0: Input should be a finite number",
        "merging.1.options: rule 'ties' has no option 'densty': did you mean 'density'",
        "sedes: unknown option; did you mean 'seeds'",
    ]
    assert told.startswith(f"r.yaml: {len(expected)} problems")
    for line in expected:
        assert line in told


def test_options_of_a_rule_are_typed() -> None:
    assert "option 'density'" in fault(merging=[{"rule": "ties", "scales": [1], "options": {"density": 7}}])
    recipe = Recipe.parse(
        tiny_study.recipe(merging=[{"rule": "ties", "scales": [1], "options": {"density": 0.5}}]), "r"
    )
    assert recipe.merging[0].filled().items() > {"density": 0.5}.items()


def test_what_would_share_a_folder_is_refused() -> None:
    twice = fault(
        inits={"a b": {}, "A-b": {}},
        seeds=[1, 1],
        merging=[{"rule": "tsv", "scales": [1]}, {"rule": "tsv", "scales": [2]}],
    )
    for part in (
        "'a b' and 'A-b' would share one folder",
        "the same seed twice",
        "the same rule with the same options",
    ):
        assert part in twice
    assert slug("OSRM, kept (fast)/..") == "OSRM-kept-fast"
    assert slug("../x") == "x"
    assert slug("/") == "-"


@pytest.mark.parametrize(
    ("given", "filled"),
    [
        ({}, ("apart", "atlas", "free", "response")),
        ({"off": "others"}, ("apart", "others", "free", "response")),
        ({"keep": "projected"}, ("apart", "atlas", "projected", "response")),
        ({"rule": "osrm"}, ("osrm", "others", "free", "unit")),
        ({"rule": "random", "scale": "response"}, ("random", "others", "free", "response")),
    ],
)
def test_an_init_is_filled_in_as_its_rule_is_meant(given: dict[str, Any], filled: tuple[str, ...]) -> None:
    settings = InitSettings(**given)
    assert (settings.rule, settings.off, settings.keep, settings.scale) == filled


def test_numbers_are_labels_too_and_epochs_are_per_task() -> None:
    raw = tiny_study.recipe()
    raw["tasks"]["mood"] |= {"labels": [0, 1], "epochs": 7}
    recipe = Recipe.parse(raw, "r")
    mood = recipe.tasks["mood"]
    assert isinstance(mood, FileTask)
    assert mood.labels == ["0", "1"]
    assert recipe.training_of("mood").epochs == 7
    assert recipe.training_of("tone") == recipe.training


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: {x: 1, x: 2}\n", "'x' is given twice"),
        ("a: [1\n", "not valid YAML"),
        ("", "a recipe is a mapping"),
        ("- 1\n", "a recipe is a mapping"),
        (b"\xff\xfe\x00", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str | bytes, told: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LoraloomError, match=told):
        Recipe.load(path)
    with pytest.raises(LoraloomError, match=r"gone\.yaml: cannot be read: No such file"):
        Recipe.load(tmp_path / "gone.yaml")
    with pytest.raises(LoraloomError, match="is a folder"):
        Recipe.load(tmp_path)


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n  k: 1\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: [" + "[" * 200_000, "nested too deeply (line 1)"),
        ("\n".join(f"{' ' * i}a{i}:" for i in range(300)), "nested too deeply (line 20)"),
        ("? " * 1000, "nested too deeply"),
        (LAUGHS, "aliases unfold without end"),
        (MERGES, "r.yaml: "),  # newer parsers take each key once, older ones are stopped
        ("name: &a [*a]", "aliases unfold without end"),
        ("name: x\nbase: !!int foo", "no int (line 2)"),
        ("name: !!float ''", "no float (line 1)"),
        ("name: !!bool foo", "no bool (line 1)"),
        ("name: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("name: !!binary x", "could not determine a constructor"),
        ("seeds: [" + "9" * 5000 + "]", "no int (line 1)"),
        ("seeds: [0x" + "f" * 5000 + "]", "a number of more than 64 bits"),
        ('name: "\\ud800"', "surrogates not allowed"),
        ("[a]: b", "found unhashable key"),
        ("name: \x00", "special characters are not allowed"),
        ("x" * 300_000, "larger than 256 kB"),
        ("seeds: [-1, 4294967296]", "seeds.1: Input should be less than 4294967296"),
    ],
)
def test_yaml_that_no_parser_should_hold(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(LoraloomError) as caught:
        Recipe.load(path)
    assert time.process_time() - started < 2
    assert told in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 5000


def test_a_recipe_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.yaml")
    with pytest.raises(LoraloomError, match="is no regular file"):
        Recipe.load(tmp_path / "r.yaml")


def test_a_date_is_the_text_that_was_written(tmp_path: Path) -> None:
    raw = tiny_study.recipe()
    raw["tasks"]["mood"] |= {"labels": ["DATE", "other"]}
    text = yaml.safe_dump(raw).replace("DATE", "2001-99-99").replace("name: tiny", "name: 2001-01-01")
    (tmp_path / "r.yaml").write_text(text)
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert recipe.name == "2001-01-01"
    assert recipe.tasks["mood"].labels == ["2001-99-99", "other"]  # type: ignore[union-attr]


@pytest.mark.parametrize("path", ["~nobody-of-this-name/a.jsonl", "nul\0.jsonl", "loop/a.jsonl"])
def test_paths_that_are_none(tmp_path: Path, path: str) -> None:
    raw = tiny_study.recipe()
    raw["tasks"]["mood"] |= {"train": path}
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(LoraloomError, match=r"r\.yaml: a path in it is none: "):
        Recipe.load(tmp_path / "r.yaml")


def test_long_names_make_no_file_that_a_disk_refuses(tmp_path: Path) -> None:
    for name in ("a" * 300, "ä" * 200, "x y " * 100):
        short = slug(name)
        assert len(short.encode()) <= 80
        assert slug(name) == short != slug(f"{name}b")
    assert "a task's name is at most 80 bytes" in fault(tasks={"ä" * 41: {"source": "glue"}, "b": {"source": "glue"}})


def test_paths_start_at_the_recipes_folder_and_hub_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    (folder / "rows").mkdir(parents=True)
    (folder / "demo").mkdir()
    raw = tiny_study.recipe(base="org/model")
    common = {"source": "files", "text": ["t"]}
    raw["tasks"] = {
        "hub": {**common, "train": "org/name", "test": "org/name:config#test"},
        "files": {**common, "train": "gone.jsonl", "test": "rows"},
        "home": {**common, "train": "~/a.csv", "test": str(tmp_path / "b.csv")},
        "cola": {"source": "glue", "path": "../glue"},
    }
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def load() -> Recipe:
        (folder / "r.yaml").write_text(yaml.safe_dump(raw))
        return Recipe.load(folder / "r.yaml")

    tasks: dict[str, Any] = load().tasks
    assert (tasks["hub"].train, tasks["hub"].test) == ("org/name", "org/name:config#test")
    assert (tasks["files"].train, tasks["files"].test) == (str(folder / "gone.jsonl"), str(folder / "rows"))
    assert (tasks["home"].train, tasks["home"].test) == (str(tmp_path / "home/a.csv"), str(tmp_path / "b.csv"))
    assert tasks["cola"].path == tmp_path / "glue"
    bases = {"org/model": "org/model", "./base": str(folder / "base"), "demo": "demo", "rows": str(folder / "rows")}
    for base, resolved in bases.items():
        raw["base"] = base
        assert load().base == resolved


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_recipes_parse_and_say_how_to_run_them(path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe.name == path.stem
    assert len(recipe.tasks) == {
        "rules-glue6": 6,
        "gen6-smollm2": 6,
        "distil-glue6": 6,
        "agreement-glue5": 5,
        "subspaces-smollm2": 3,
        "subspaces-builtin": 4,
    }.get(path.stem, 8)
    comment = path.read_text(encoding="utf-8").split("\nname:")[0]
    assert f"loraloom run recipes/{path.name}" in comment
    assert "Differs" in comment
    if path.stem.startswith("paper"):
        training = recipe.training
        assert (recipe.lora.rank, recipe.lora.alpha, recipe.seeds) == (8, 16, [42])
        assert (training.learning_rate, training.warmup, training.max_length) == (4e-4, 0.06, 128)
        assert training.batch_size * training.accumulate == 64
        assert (recipe.statistics.texts, recipe.statistics.kind) == (100, "sample")


def write_glue(folder: Path, task: str) -> None:
    """Write one task in the layout of GLUE, in words of our own."""
    from loraloom.tasks.glue import GLUE

    glue = GLUE[task]
    (folder / task).mkdir(parents=True)
    for split, count in (("train", 60), ("dev", 20)):
        rows = []
        for index, row in enumerate(tiny.task(f"{task}.{split}", rows=count).train):
            label = row["label"] + 2.5 if glue.labels is None else index % len(glue.labels)
            texts = {"text_a": f"{row['text_a']} {' the' * (index // 20)}"}
            if len(glue.text) == 2:
                texts["text_b"] = f"{split} {index}"
            rows.append(json.dumps({**texts, "label": label}))
        (folder / task / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / task / "meta.json").write_text(json.dumps({"labels": glue.labels}))


@pytest.mark.parametrize(
    ("name", "kind"), [("paper-roberta-large", "roberta"), ("paper-t5-large", "t5"), ("paper-llama-3.2-1b", "llama")]
)
def test_the_papers_recipes_run_on_tiny_models_of_their_kind(tmp_path: Path, name: str, kind: str) -> None:
    """As shipped but for the base, the rows, and what makes them long."""
    from loraloom.study.export import run_study

    raw = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    reduced = copy.deepcopy(raw)
    reduced["tasks"] = {task: {"source": "glue", "path": "glue", "heldout_rows": 12} for task in ("rte", "stsb")}
    for task in reduced["tasks"]:
        write_glue(tmp_path / "glue", task)
    reduced["statistics"] |= {"texts": 12, "max_length": 32}
    reduced["training"] |= {"epochs": 1, "max_length": 32}
    reduced["alignment"] |= {"texts": 12}
    reduced["inits"] = {key: raw["inits"][key] for key in ("mean", "OSRM")}
    reduced["merging"] = [{**entry, "scales": entry["scales"][:2]} for entry in raw["merging"]]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(reduced, sort_keys=False))
    recipe = Recipe.load(tmp_path / "r.yaml")
    base = str(tiny.base_folder(kind, tmp_path / "base"))
    result = run_study(recipe.model_copy(update={"base": base}), tmp_path / "study")
    assert [init.name for init in result.inits] == ["mean", "OSRM"]
    assert len(result.singles) == 4
    targets = tuple(raw["lora"]["targets"])
    assert all(layer.endswith(targets) for table in result.interference for layer in table.layers)
    assert sum(1 for merge in result.merges if merge.split == "heldout") == 2 * 2 * 2 * 2
    for init in result.inits:
        assert (tmp_path / "study" / "adapters" / init.name / "stsb" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared GLUE rows are not here")
def test_glue8_reads_its_rows() -> None:
    from loraloom.study.tasks import build_task

    recipe = Recipe.load(RECIPES / "glue8-minilm.yaml")
    for name, settings in recipe.tasks.items():
        assert isinstance(settings, GlueTask)
        task = build_task(name, settings)
        assert (len(task.train), len(task.heldout)) == (settings.train_rows, settings.heldout_rows)
        assert recipe.sample_problems(task) == []


def test_the_texts_of_a_rule_are_those_of_its_entry() -> None:
    merging = [
        {"rule": "iteris", "scales": [1.0], "texts": 7},
        {"rule": "iteris", "scales": [1.0], "texts": 9, "options": {"ridge": 0.5}},
    ]
    recipe = Recipe.parse(tiny_study.recipe(merging=merging), "r")
    assert recipe.probe_texts("iteris", {}) == 7
    assert recipe.probe_texts("iteris", {"ridge": 0.5}) == 9
    assert recipe.probe_texts("iteris", {"no": "such option"}) == 7
    assert recipe.probe_texts("regmean_pp", {}) == 100
