"""Chat templates: the well-known ones by name, that of a model, and the files of a tokenizer with another one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from seme.checkpoint.index import json_text, read_json
from seme.errors import CheckpointError, cannot_read

FILE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
AUTO = "auto"
MAX_TEMPLATE = 1 << 20
"""Bytes of a template file that are accepted."""

TEMPLATES = {
    "alpaca": (
        "{% for m in messages if m.role == 'system' %}{{ m.content.strip() + '\\n\\n' }}{% endfor %}"
        "{% set titles = {'user': 'Instruction', 'user_context': 'Input', 'assistant': 'Response'} %}"
        "{% for m in messages if m.role in titles %}"
        "{{ '### ' + titles[m.role] + ':\\n' + m.content.strip() + '\\n\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% if messages[0].role != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
        "{% for m in messages %}{{ '[|' + m.role + '|]' + m.content }}"
        "{{ '\\n' if m.role == 'user' else '[|endofturn|]\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content.strip() + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{% set first = messages[0] %}{% set has = first.role == 'system' %}"
        "{% set turns = messages[1:] if has else messages %}{{ bos_token }}{% for m in turns %}"
        "{% if m.role != ('assistant' if loop.index0 % 2 else 'user') %}"
        "{{ raise_exception('after the system message, if any, user and assistant take turns') }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ ' [INST] ' + (first.content + '\\n\\n' if has and loop.first else '') + m.content + ' [/INST]' }}"
        "{% endif %}{% endfor %}"
    ),
}
"""Jinja, with the variables that transformers gives a template."""


def template_of(folder: Path) -> str | None:
    """The chat template of a model, that for general use if it has several; None if it has none."""
    if (folder / FILE).is_file():
        try:
            with (folder / FILE).open("rb") as f:
                raw = f.read(MAX_TEMPLATE + 1)
            if len(raw) > MAX_TEMPLATE:
                raise CheckpointError(f"{folder / FILE}: more than {MAX_TEMPLATE} bytes, no template is so long")
            return raw.decode("utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            said = cannot_read(e) if isinstance(e, OSError) else "is not UTF-8 text"
            raise CheckpointError(f"{folder / FILE}: {said}") from e
    found: Any = read_json(folder / SETTINGS).get("chat_template") if (folder / SETTINGS).is_file() else None
    if isinstance(found, list):
        found = next((t.get("template") for t in found if isinstance(t, Mapping) and t.get("name") == "default"), None)
    if isinstance(found, Mapping):
        found = found.get("default")
    return found.strip() or None if isinstance(found, str) else None


def choose(value: str, folders: Iterable[Path]) -> str | None:
    """The template that a recipe asks for; None if it asks for that of most models and none has one."""
    if value != AUTO:
        return TEMPLATES.get(value, value)
    found = Counter(t for folder in folders if (t := template_of(folder)) is not None)
    return found.most_common(1)[0][0] if found else None


def with_template(folder: Path, files: Mapping[str, str], template: str) -> dict[str, str]:
    """Files of a tokenizer, as ``files`` has them or else the folder, with another template where transformers looks
    for it: in a file of its own, and no more in ``tokenizer_config.json``."""
    try:
        template.encode()
    except UnicodeEncodeError as e:
        raise CheckpointError(f"{folder}: the chat template holds half a surrogate pair, which is no text") from e
    found = {**files, FILE: template}
    settings: dict[str, Any] = {}
    if SETTINGS in files:
        settings = json.loads(files[SETTINGS])
    elif (folder / SETTINGS).is_file():
        settings = read_json(folder / SETTINGS)
    if "chat_template" in settings:
        kept = {k: v for k, v in settings.items() if k != "chat_template"}
        found[SETTINGS] = json_text(kept, indent=2)
    return found
