"""The model card of a merge: README.md with the front matter that the hub reads."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from seme import __version__

if TYPE_CHECKING:
    from seme.plan import Plan


def model_card(plan: Plan, name: str) -> str:
    """The card's text: what was merged, how, with which recipe and version.

    Args:
        plan: the merge.
        name: name of the output folder, used as the title.
    """
    import yaml

    models = [str(m.ref) for m in plan.models]
    front = {"base_model": models, "library_name": "transformers", "tags": ["merge", "seme"]}
    base = plan.config.base_model
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        f"# {name}",
        "",
        f"A merge of language models, made with seme {__version__} (Python {platform.python_version()}).",
        "",
        "## Method",
        "",
        f"`{plan.method.name}`: {plan.method.summary} ({plan.method.source})",
        "",
    ]
    if base is not None:
        lines += [f"Base model: `{base}`", ""]
    lines += ["## Models", ""]
    lines += [f"- `{m}`" for m in models]
    lines += ["", "## Recipe", "", "```yaml", plan.config.source.strip(), "```", ""]
    return "\n".join(lines)
