"""The model card of a merge: README.md with the front matter that the hub reads."""

from __future__ import annotations

import platform
import re
from typing import TYPE_CHECKING, Any

from seme import __version__
from seme.report.merge_report import card_section

if TYPE_CHECKING:
    from seme.plan import Plan


def model_card(plan: Plan, name: str, report: dict[str, Any] | None = None) -> str:
    """The card's text: what was merged, how, with which recipe and version.

    Args:
        plan: the merge.
        name: name of the output folder, used as the title.
        report: the merge report, if the method made one.
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
    lines.append("")
    lines += card_section(report) if report is not None else []
    recipe = plan.config.source.strip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0))
    lines += ["## Recipe", "", f"{fence}yaml", recipe, fence, ""]
    return "\n".join(lines)
