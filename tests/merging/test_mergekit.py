"""mergekit's YAML gives mergekit's values: its formulas in dense float64, written down from its own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from commands import call, refused, said
from loraloom.adapters.peft import read_adapter, write_adapter
from loraloom.adapters.update import Adapter, Update
from loraloom.errors import LoraloomError
from loraloom.merging.mergekit import read_mergekit
from loraloom.merging.planning import make_plan

LAYER, M, N = "model.layers.0.self_attn.q_proj", 10, 20
BASE = "org/base"


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        update = Update(torch.randn(M, 2 + i, generator=generator), torch.randn(2 + i, N, generator=generator))
        config = {"peft_type": "LORA", "base_model_name_or_path": BASE, "target_modules": ["q_proj"]}
        write_adapter(Adapter({LAYER: update}, config), tmp_path / f"lora{i}", provenance={})
    return [tmp_path / f"lora{i}" for i in range(3)]


def recipe(loras: list[Path], method: str, shared: Any = None, own: Any = (), **more: Any) -> Path:
    """Write a YAML of mergekit's beside the adapters."""
    given = [*own, *({} for _ in loras)]
    models = [{"model": f"{BASE}+{path}", "parameters": given[i]} for i, path in enumerate(loras)]
    content = {"merge_method": method, "base_model": BASE, "models": models, "parameters": shared or {}, **more}
    path = loras[0].parent / "recipe.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def merged(path: Path, seed: int = 0) -> Tensor:
    """Return dW as the YAML asks for it, nothing truncated."""
    asked = read_mergekit(path)
    found = make_plan([read_adapter(folder) for folder in asked.adapters], asked.options).result(LAYER)
    return (found.dense() if isinstance(found, Update) else found).double()


def deltas(loras: list[Path]) -> Tensor:
    updates = [read_adapter(path).updates[LAYER] for path in loras]
    return torch.stack([update.B.double() @ update.A.double() for update in updates])


def kept(dW: Tensor, first: int, last: int) -> Tensor:
    """mergekit's masks: what lies between two places of the entries by falling size."""
    mask = torch.zeros_like(dW).flatten()
    mask[dW.abs().flatten().argsort(descending=True)[first:last]] = 1
    return dW * mask.view(dW.shape)


def generalised(
    dW: Tensor, weights: list[float], *, votes: bool = False, normalize: bool = False, scale: float = 1.0
) -> Tensor:
    """GTATask.execute of mergekit, after what it drops."""
    w = torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    weighted = dW * w
    if votes:
        majority = (weighted.sum(dim=0) >= 0).double() * 2 - 1
        mask = weighted.sign() == majority
        mixed, divisor = (weighted * mask).sum(dim=0), (w * mask).sum(dim=0)
        divisor[divisor == 0] = 1
    else:
        mixed, divisor = weighted.sum(dim=0), w.sum(dim=0)
        divisor[divisor.abs() < 1e-8] = 1
    return scale * (mixed / divisor if normalize else mixed)


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm()) <= 1e-6 * float(expected.norm())


WEIGHTS = [0.7, 0.3, 1.5]
OWN = [{"weight": weight} for weight in WEIGHTS]


@pytest.mark.parametrize("normalize", [False, True])
def test_sums(loras: list[Path], normalize: bool) -> None:
    dW = deltas(loras)
    given = {"normalize": normalize, "lambda": 0.6}
    expected = generalised(dW, WEIGHTS, normalize=normalize, scale=0.6)
    assert close(merged(recipe(loras, "task_arithmetic", given, OWN)), expected)
    given |= {"density": 0.35, "gamma": 0.05}
    crumbs = torch.stack([kept(one, 10, 80) for one in dW])
    expected = generalised(crumbs, WEIGHTS, normalize=normalize, scale=0.6)
    assert close(merged(recipe(loras, "breadcrumbs", given, OWN)), expected)


def test_linear_averages_whole_models(loras: list[Path]) -> None:
    """W = sum w (base + dW) / sum w, over the base too where it is among the models."""
    expected = generalised(deltas(loras), WEIGHTS, normalize=True)
    path = recipe(loras, "linear", None, OWN)
    assert close(merged(path), expected)
    content = yaml.safe_load(path.read_text())
    content["models"].append({"model": BASE, "parameters": {"weight": 2.5}})
    path.write_text(yaml.safe_dump(content))
    assert close(merged(path), expected * 2.5 / 5.0)
    shares = [{"weight": weight} for weight in (0.5, 0.2, 0.3)]
    off = recipe(loras, "linear", {"normalize": False}, shares)
    assert close(merged(off), generalised(deltas(loras), [0.5, 0.2, 0.3]))
    with pytest.raises(LoraloomError, match=r"weights that sum to 2\.5 scale the base too"):
        read_mergekit(recipe(loras, "linear", {"normalize": False}, OWN))


@pytest.mark.parametrize("normalize", [None, False])
def test_ties_divides_by_the_weights_that_agree(loras: list[Path], normalize: bool | None) -> None:
    given = {"density": 0.35} | ({} if normalize is None else {"normalize": normalize})
    trimmed = torch.stack([kept(one, 0, 70) for one in deltas(loras)])
    expected = generalised(trimmed, WEIGHTS, votes=True, normalize=normalize is None)
    assert close(merged(recipe(loras, "ties", given, OWN)), expected)


def test_densities_of_1_are_the_default(loras: list[Path]) -> None:
    dW = deltas(loras)
    assert close(merged(recipe(loras, "ties", None, OWN)), generalised(dW, WEIGHTS, votes=True, normalize=True))
    assert close(merged(recipe(loras, "dare_linear", None, OWN)), generalised(dW, WEIGHTS))
    assert close(merged(recipe(loras, "dare_ties", None, OWN)), generalised(dW, WEIGHTS, votes=True))


def test_dare_drops_at_random_and_rescales_where_it_is_told_to(loras: list[Path]) -> None:
    """Which entries fall is drawn; of one adapter, those that are left are its own."""
    dW = deltas(loras[:1])[0]
    for rescale, factor in ((True, 1 / 0.4), (False, 1.0)):
        path = recipe(loras[:1], "dare_linear", {"density": 0.4, "weight": 0.5, "rescale": rescale})
        found = merged(path) / (0.5 * factor)
        left = found != 0
        assert 0.2 < left.double().mean() < 0.6
        assert close(found, dW * left)
        assert ("rescale" in read_mergekit(path).left_out) == rescale


def test_sce(loras: list[Path]) -> None:
    dW = deltas(loras)
    chosen = dW.var(dim=0, unbiased=False).flatten().topk(int(M * N * 0.35)).indices
    mask = torch.zeros(M * N, dtype=torch.float64)
    mask[chosen] = 1
    selected = dW * mask.view(M, N)
    agreeing = selected.sign() == (selected.sum(dim=0) >= 0).double() * 2 - 1
    shares = selected.square().mean(dim=(1, 2))
    erased = (shares / shares.sum()).view(-1, 1, 1) * agreeing
    expected = (selected * erased).sum(dim=0) / erased.sum(dim=0).clamp(min=1e-6)
    assert close(merged(recipe(loras, "sce", {"select_topk": 0.35})), expected)


def test_numbers_written_in_mergekits_ways(loras: list[Path]) -> None:
    """A gradient of equal numbers, and filters whose first, or whose every value, holds everywhere, are a number."""
    one = [{"filter": "mlp", "value": 0.3}, {"value": 0.3}]
    own = [{"weight": [0.7, 0.7]}, {"weight": one}, {"weight": [{"value": 1.5}, {"filter": "x", "value": 0}]}]
    assert read_mergekit(recipe(loras, "task_arithmetic", None, own)).options.weights == WEIGHTS
    given = {"weight": 0.5, "int8_mask": True}
    asked = read_mergekit(recipe(loras, "task_arithmetic", given, dtype="bfloat16", out_dtype="float16"))
    assert (asked.options.weights, asked.options.dtype, [*asked.left_out]) == ([0.5] * 3, "float16", ["int8_mask"])


def test_what_is_not_taken_is_named_and_what_would_change_values_is_refused(loras: list[Path]) -> None:
    own = [{"weight": [0, 0.5], "density": 0.5}, {"weight": 1, "density": 0.3}, {"density": 0.5}]
    path = recipe(loras, "ties", {"rescale": True, "epsilon": 0.1}, own, tokenizer_source="union", nmae="x")
    content = yaml.safe_load(path.read_text())
    content["models"].append({"model": "other/model"})
    path.write_text(yaml.safe_dump(content))
    told = refused("merge", "--from-mergekit", path, "-o", path.parent / "out")
    for problem in (
        "weight [0, 0.5] changes over layers or tensors",
        "density differs between the models (0.5, 0.3, 0.5)",
        "has no weight",
        "rescale is not taken but for dare",
        "model 'other/model' is a whole model",
    ):
        assert problem in told
    assert "merge_method 'slerp' is not taken: interpolates" in refused(
        "merge", "--from-mergekit", recipe(loras, "slerp", {"t": 0.5}), "-o", path.parent / "out"
    )
    assert "did you mean 'ties'" in refused("merge", "--from-mergekit", recipe(loras, "tise"), "-o", path.parent / "o")
    path.write_text(yaml.safe_dump({"merge_method": "linear", "slices": [{"sources": []}]}))
    assert "slices is not taken" in refused("merge", "--from-mergekit", path, "-o", path.parent / "out")


def test_the_documented_recipe_is_taken(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "mergekit.md").read_text(encoding="utf-8")
    example = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "recipe.yml").write_text(example)
    asked = read_mergekit(tmp_path / "recipe.yml").options
    assert asked.options == {"density": 0.5, "divisor": "weights"}
    assert (asked.weights, asked.scale, asked.dtype) == ([0.7, 0.3], 0.9, "bfloat16")


def test_the_command(loras: list[Path], tmp_path: Path) -> None:
    path = recipe(loras, "ties", {"density": 0.35}, OWN, dtype="bfloat16", chat_template="chatml")
    told = said("merge", "--from-mergekit", path, "-o", tmp_path / "out")
    assert (told["rule"], told["scale"], [*told["not_taken"]]) == ("ties", 1.0, ["chat_template"])
    assert [one["weight"] for one in told["inputs"]] == WEIGHTS
    written = read_adapter(tmp_path / "out")
    assert written.dtype == torch.bfloat16
    dW = written.updates[LAYER].dense().double()
    expected = merged(path)
    U, S, Vh = torch.linalg.svd(expected)
    assert float((dW - U[:, :9] * S[:9] @ Vh[:9]).norm() / expected.norm()) < 0.02
    assert "chat_template is not taken" in call("merge", "--from-mergekit", path, "-o", tmp_path / "two").stderr
    beside = refused("merge", loras[0], "--from-mergekit", path, "--rule", "ties", "-o", tmp_path / "out")
    assert "leave out --rule and adapters" in beside
    assert "did you mean 'float16'" in refused("merge", *loras, "--dtype", "flaot16", "-o", tmp_path / "three")
    assert "no adapters: give at least one" in refused("merge", "-o", tmp_path / "three")
