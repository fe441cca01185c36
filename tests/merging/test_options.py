"""What a merge is asked for is said in one place."""

from __future__ import annotations

import inspect
from dataclasses import fields

from loraloom.merging import MergeOptions, merge


def test_merge_takes_every_option_by_its_name_and_default() -> None:
    """What `merge` offers beside the options is given to the rule, not asked of it."""
    parameters = dict(inspect.signature(merge).parameters)
    for name in ("adapters", "statistics", "probe", "distiller"):
        del parameters[name]
    assert list(parameters) == [*(field.name for field in fields(MergeOptions) if field.name != "options"), "options"]
    options = MergeOptions()
    for name, parameter in parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            assert parameter.default == getattr(options, name), name
