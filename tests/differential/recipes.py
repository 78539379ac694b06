"""The recipes that both tools run, as templates of mergekit's YAML.

``$base``, ``$a``, ``$b``, ``$c`` are models (see :mod:`.families`), ``$attention``, ``$mlp`` and ``$second`` parts
of the architecture's tensor names. A precision is written after them.
"""

from __future__ import annotations

LINEAR = {
    "scalars": """
merge_method: linear
models:
  - {model: $a, parameters: {weight: 0.3}}
  - {model: $b, parameters: {weight: "7e-1"}}
  - {model: $c, parameters: {weight: 1}}
""",
    "gradients": """
merge_method: linear
models:
  - {model: $a, parameters: {weight: [0.1, 0.9]}}
  - {model: $b, parameters: {weight: [0.7, 0.2, 0.33, "4e-1", 0.6]}}
""",
    "filters": """
merge_method: linear
models:
  - model: $a
    parameters:
      weight:
        - {filter: $mlp, value: 0.2}
        - {filter: $second, value: [0.4, 0.9]}
  - model: $b
    parameters:
      weight: {filter: $attention, value: [0.15, 0.85]}
  - model: $c
parameters:
  weight:
    - {filter: norm, value: 0.6}
    - {value: 0.45}
""",
    "negative": """
merge_method: linear
models:
  - {model: $a, parameters: {weight: 1.4}}
  - {model: $b, parameters: {weight: -0.3}}
  - {model: $c, parameters: {weight: 0.12}}
parameters: {normalize: false}
""",
    "base-in-the-middle": """
merge_method: linear
models:
  - {model: $a, parameters: {weight: 0.3}}
  - {model: $base, parameters: {weight: 0.5}}
  - {model: $b, parameters: {weight: 0.35}}
base_model: $base
""",
    "base-not-listed": """
merge_method: linear
models:
  - {model: $a, parameters: {weight: 0.3}}
  - {model: $b}
base_model: $base
parameters: {weight: 0.55}
""",
    "normalize-by-filter": """
merge_method: linear
models:
  - {model: $a, parameters: {weight: 0.3}}
  - {model: $b, parameters: {weight: 0.4}}
parameters:
  normalize:
    - {filter: $attention, value: false}
    - {filter: $mlp, value: [true, false]}
    - {filter: "*", value: "yes"}
""",
    "one-model": """
merge_method: linear
models: [{model: $a, parameters: {weight: 0.3}}]
""",
}

TASK_ARITHMETIC = {
    "scalars": """
merge_method: task_arithmetic
models:
  - {model: $a, parameters: {weight: 0.3}}
  - {model: $b, parameters: {weight: 0.7}}
  - {model: $c, parameters: {weight: "5e-1"}}
base_model: $base
parameters: {lambda: 0.7}
""",
    "base-in-the-middle": """
merge_method: task_arithmetic
models:
  - {model: $a, parameters: {weight: 0.3}}
  - {model: $base, parameters: {weight: 0.9}}
  - {model: $b, parameters: {weight: 0.4}}
base_model: $base
""",
    "base-first": """
merge_method: task_arithmetic
models:
  - {model: $base}
  - {model: $b, parameters: {weight: 0.3}}
  - {model: $c, parameters: {weight: 0.4}}
  - {model: $a, parameters: {weight: 0.1}}
base_model: $base
""",
    "gradients": """
merge_method: task_arithmetic
models:
  - {model: $a, parameters: {weight: [0.1, 0.9]}}
  - {model: $b, parameters: {weight: [0.7, 0.2, 0.33, 0.4, 0.6]}}
base_model: $base
parameters: {lambda: [1.3, 0.4, 0.9]}
""",
    "filters": """
merge_method: task_arithmetic
models:
  - model: $a
    parameters:
      weight:
        - {filter: $mlp, value: -0.2}
        - {filter: $second, value: [0.4, 0.9]}
  - model: $b
    parameters:
      weight: {filter: $attention, value: [0.15, 0.85]}
base_model: $base
parameters:
  weight:
    - {filter: norm, value: 0.6}
    - {filter: "*", value: 0.45}
  lambda:
    - {filter: $attention, value: 1.25}
""",
    "normalize": """
merge_method: task_arithmetic
models:
  - {model: $a, parameters: {weight: 0.3}}
  - {model: $b, parameters: {weight: 0.9}}
  - {model: $c, parameters: {weight: 0.15}}
base_model: $base
parameters: {normalize: true, lambda: 1.1}
""",
    "normalize-by-filter": """
merge_method: task_arithmetic
models:
  - {model: $a, parameters: {weight: 0.3}}
  - {model: $c, parameters: {weight: 0.4}}
base_model: $base
parameters:
  normalize:
    - {filter: $attention, value: true}
    - {filter: $mlp, value: [true, false]}
""",
    "without-effect": """
merge_method: task_arithmetic
models:
  - {model: $a, parameters: {weight: 0.3, density: 0.1}}
  - {model: $c, parameters: {weight: -0.4}}
base_model: $base
parameters: {density: 0.5, rescale: true, int8_mask: true, lambda: -0.5}
""",
    "base-alone": """
merge_method: task_arithmetic
models: [{model: $base}]
base_model: $base
""",
}

SLERP = {
    "classic": """
merge_method: slerp
models:
  - {model: $base}
  - {model: $c}
base_model: $base
parameters:
  t:
    - {filter: $attention, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: $mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - {value: 0.5}
""",
    "base-last": """
merge_method: slerp
models:
  - {model: $c}
  - {model: $base}
base_model: $base
parameters: {t: 0.3}
""",
    "base-not-listed": """
merge_method: slerp
models: [{model: $b}]
base_model: $base
parameters: {t: "2.5e-1"}
""",
    "gradient": """
merge_method: slerp
models:
  - {model: $base}
  - {model: $a}
base_model: $base
parameters: {t: [0.9, 0.05, 0.45]}
""",
    "beyond": """
merge_method: slerp
models:
  - {model: $base}
  - {model: $c}
base_model: $base
parameters:
  t:
    - {filter: $attention, value: 1.25}
    - {filter: $mlp, value: -0.4}
    - {value: 1}
""",
}

TIES = {
    "scalars": """
merge_method: ties
models:
  - {model: $a, parameters: {weight: 0.3, density: 0.5}}
  - {model: $b, parameters: {weight: 0.7, density: 0.25}}
  - {model: $c, parameters: {weight: "5e-1", density: 0.9}}
base_model: $base
""",
    "defaults": """
merge_method: ties
models:
  - {model: $a, parameters: {weight: 0.3}}
  - {model: $b, parameters: {weight: 0.7}}
  - {model: $c, parameters: {weight: 0.4}}
base_model: $base
""",
    "gradients": """
merge_method: ties
models:
  - {model: $a, parameters: {weight: [0.1, 0.9], density: [0.2, 0.8]}}
  - {model: $base, parameters: {weight: 0.9, density: 0.1}}
  - {model: $b, parameters: {weight: 0.4, density: [1, 0.33, 0]}}
base_model: $base
parameters: {lambda: [1.3, 0.4]}
""",
    "filters": """
merge_method: ties
models:
  - model: $a
    parameters:
      weight: 0.6
      density:
        - {filter: $mlp, value: 0.2}
        - {filter: $second, value: [0.4, 0.9]}
  - model: $c
    parameters:
      weight: {filter: $attention, value: [0.15, 0.85]}
base_model: $base
parameters:
  weight: 0.35
  density:
    - {filter: norm, value: 1}
    - {value: 0.45}
  normalize:
    - {filter: $attention, value: [false, true]}
""",
    "not-normalized": """
merge_method: ties
models:
  - {model: $a, parameters: {weight: 0.3}}
  - {model: $b, parameters: {weight: 0.7}}
  - {model: $c, parameters: {weight: 0.2}}
base_model: $base
parameters: {density: 0.6, normalize: false, lambda: 0.6, int8_mask: true}
""",
    "negative": """
merge_method: ties
models:
  - {model: $a, parameters: {weight: 0.5}}
  - {model: $b, parameters: {weight: -0.5}}
  - {model: $c, parameters: {weight: 0.25}}
base_model: $base
parameters: {density: 0.7}
""",
    "weights-cancel": """
merge_method: ties
models:
  - {model: $a, parameters: {weight: 0.5}}
  - {model: $c, parameters: {weight: -0.5}}
base_model: $base
parameters: {density: 0.7}
""",
    "extreme-densities": """
merge_method: ties
models:
  - {model: $a, parameters: {weight: 0.5, density: 1e-9}}
  - {model: $b, parameters: {weight: 0.4, density: 0}}
  - {model: $c, parameters: {weight: 0.3, density: 1}}
base_model: $base
""",
    "rescale": """
merge_method: ties
models:
  - {model: $a, parameters: {weight: 0.5, density: 0.3}}
  - {model: $b, parameters: {weight: 0.4, density: 0.55}}
  - {model: $c, parameters: {weight: 0.3}}
base_model: $base
parameters: {rescale: true, lambda: 0.9}
""",
    "base-alone": """
merge_method: ties
models: [{model: $base}]
base_model: $base
parameters: {density: 0.5}
""",
}

SCE = {
    "selection": """
merge_method: sce
models: [{model: $a}, {model: $b}, {model: $c}]
base_model: $base
parameters: {select_topk: 0.35}
""",
    "defaults": """
merge_method: sce
models: [{model: $a}, {model: $base}, {model: $c}]
base_model: $base
""",
    "filters": """
merge_method: sce
models: [{model: $b}, {model: $c}]
base_model: $base
parameters:
  int8_mask: true
  select_topk:
    - {filter: $mlp, value: [0.1, 0.8]}
    - {filter: $attention, value: 0}
    - {filter: norm, value: 1}
    - {value: "5e-1"}
""",
    "one-model": """
merge_method: sce
models: [{model: $c}]
base_model: $base
parameters: {select_topk: [0.5, 1]}
""",
}

RAM = {
    "defaults": """
merge_method: ram
models: [{model: $a}, {model: $b}, {model: $c}]
base_model: $base
""",
    "filters": """
merge_method: ram
models: [{model: $b}, {model: $base}, {model: $c}]
base_model: $base
parameters:
  epsilon:
    - {filter: $mlp, value: [0.001, 0.02]}
    - {filter: $attention, value: 0}
    - {value: 0.004}
""",
}

RAMPLUS_TL = {
    "defaults": """
merge_method: ramplus_tl
models: [{model: $a}, {model: $b}, {model: $c}]
base_model: $base
parameters: {epsilon: 0.003}
""",
    "filters": """
merge_method: ramplus_tl
models: [{model: $b}, {model: $c}]
base_model: $base
parameters:
  r: [0.1, 0.9]
  alpha: [{filter: $mlp, value: 3}, {value: 0.4}]
  epsilon: [{filter: $attention, value: 0.01}]
""",
}

ARCEE_FUSION = {
    "classic": """
merge_method: arcee_fusion
models: [{model: $base}, {model: $c}]
base_model: $base
""",
    "base-not-listed": """
merge_method: arcee_fusion
models: [{model: $b}]
base_model: $base
""",
}

BREADCRUMBS = {
    "scalars": """
merge_method: breadcrumbs
models:
  - {model: $a, parameters: {weight: 0.3, density: 0.5}}
  - {model: $b, parameters: {weight: 0.7, density: 0.25, gamma: 0.1}}
  - {model: $c, parameters: {weight: "5e-1", density: 0.9, gamma: 0.3}}
base_model: $base
parameters: {lambda: 0.8}
""",
    "defaults": """
merge_method: breadcrumbs
models:
  - {model: $a, parameters: {weight: 0.3}}
  - {model: $b, parameters: {weight: 0.7}}
base_model: $base
""",
    "filters": """
merge_method: breadcrumbs
models:
  - model: $a
    parameters:
      weight: 0.6
      density:
        - {filter: $mlp, value: 0.2}
        - {filter: $second, value: [0.4, 0.9]}
  - model: $c
    parameters:
      weight: {filter: $attention, value: [0.15, 0.85]}
      gamma: [0.02, 0.2]
base_model: $base
parameters:
  weight: 0.35
  density:
    - {filter: norm, value: 1}
    - {value: 0.45}
  normalize:
    - {filter: $attention, value: [false, true]}
""",
    "extreme": """
merge_method: breadcrumbs
models:
  - {model: $a, parameters: {weight: 0.5, density: 1e-9, gamma: 0.2}}
  - {model: $b, parameters: {weight: 0.4, density: 0.3, gamma: 1}}
  - {model: $c, parameters: {weight: 0.3, density: 0.4, gamma: 0}}
base_model: $base
""",
    "rescale": """
merge_method: breadcrumbs
models:
  - {model: $a, parameters: {weight: 0.5, density: 0.3}}
  - {model: $b, parameters: {weight: 0.4, density: 0.55, gamma: 0.05}}
  - {model: $c, parameters: {weight: 0.3}}
base_model: $base
parameters: {rescale: true, lambda: 0.9}
""",
}


def renamed(recipes: dict[str, str], old: str, new: str) -> dict[str, str]:
    """The same recipes with another method."""
    return {name: text.replace(f"merge_method: {old}", f"merge_method: {new}") for name, text in recipes.items()}


PASSTHROUGH = {
    "scale": """
merge_method: passthrough
models: [{model: $a, parameters: {scale: 0.3}}]
""",
    "filters": """
merge_method: passthrough
models:
  - model: $a
    parameters:
      scale:
        - {filter: $mlp, value: 0}
        - {filter: $attention, value: [1.3, -0.7, 0.2]}
""",
    "plain": """
merge_method: passthrough
models: [{model: $b}]
""",
}

# Columns of many elements: those of two or three may point opposite ways, where sin(theta) divides rounding errors.
NUSLERP = {
    "scalars": """
merge_method: nuslerp
models:
  - {model: $a, parameters: {weight: 0.3}}
  - {model: $c, parameters: {weight: "5e-1"}}
""",
    "base": """
merge_method: nuslerp
models:
  - {model: $a, parameters: {weight: 0.3}}
  - {model: $c, parameters: {weight: 0.9}}
base_model: $base
""",
    "filters": """
merge_method: nuslerp
models:
  - model: $a
    parameters:
      weight:
        - {filter: $mlp, value: -0.2}
        - {filter: $second, value: [0.4, 0.9]}
  - {model: $base}
  - model: $b
    parameters:
      weight: {filter: $attention, value: [0.15, 0.85]}
base_model: $base
parameters:
  weight: 0.45
  nuslerp_flatten: {filter: $attention, value: false}
  nuslerp_row_wise: {filter: $second, value: true}
""",
    "rows": """
merge_method: nuslerp
models:
  - {model: $a, parameters: {weight: [0.2, 0.6]}}
  - {model: $c, parameters: {weight: 0.5}}
parameters: {nuslerp_flatten: false}
""",
    "columns": """
merge_method: nuslerp
models:
  - {model: $a, parameters: {weight: 0.2}}
  - {model: $c, parameters: {weight: 0.5}}
base_model: $base
parameters:
  nuslerp_flatten: [{filter: $attention, value: false}, {filter: $mlp, value: false}]
  nuslerp_row_wise: true
""",
    "weights-cancel": """
merge_method: nuslerp
models:
  - {model: $a, parameters: {weight: 0.7}}
  - {model: $b, parameters: {weight: -0.7}}
base_model: $base
""",
}

MULTISLERP = {
    "scalars": """
merge_method: multislerp
models:
  - {model: $a, parameters: {weight: 0.3}}
  - {model: $b, parameters: {weight: 0.2}}
  - {model: $c, parameters: {weight: "5e-1"}}
""",
    "base": """
merge_method: multislerp
models:
  - {model: $a, parameters: {weight: 0.3}}
  - {model: $c, parameters: {weight: [0.5, 0.2]}}
base_model: $base
""",
    "filters": """
merge_method: multislerp
models:
  - {model: $a}
  - {model: $c, parameters: {weight: {filter: $attention, value: [0.15, 0.85]}}}
  - {model: $base}
base_model: $base
parameters:
  weight: 0.45
  normalize_weights: {filter: $mlp, value: false}
""",
    "one-model": """
merge_method: multislerp
models: [{model: $a, parameters: {weight: 0.3}}]
base_model: $base
""",
}

KARCHER = {
    "defaults": """
merge_method: karcher
models: [{model: $a}, {model: $b}, {model: $c}]
""",
    "filters": """
merge_method: karcher
models: [{model: $a}, {model: $c}]
base_model: $base
parameters:
  max_iter: {filter: $mlp, value: 1}
  tol: {filter: $attention, value: 1e-3}
""",
    "one-model": """
merge_method: karcher
models: [{model: $a}]
""",
}

MODEL_STOCK = {
    "defaults": """
merge_method: model_stock
models: [{model: $a}, {model: $b}, {model: $c}]
base_model: $base
""",
    "filters": """
merge_method: model_stock
models: [{model: $base}, {model: $a}, {model: $c}]
base_model: $base
parameters:
  filter_wise: {filter: $attention, value: true}
""",
    "rows": """
merge_method: model_stock
models: [{model: $a}, {model: $b}, {model: $c}]
base_model: $base
parameters: {filter_wise: true}
""",
}

NEARSWAP = {
    "scalars": """
merge_method: nearswap
models: [{model: $a}]
base_model: $base
parameters: {t: 0.001}
""",
    "filters": """
merge_method: nearswap
models: [{model: $base}, {model: $c}]
base_model: $base
parameters:
  t:
    - {filter: $mlp, value: [0.001, 0.02, 0.005]}
    - {filter: $attention, value: -0.01}
    - {value: 0.01}
""",
    "nothing": """
merge_method: nearswap
models: [{model: $b}, {model: $base}]
base_model: $base
parameters: {t: 0}
""",
}

RECIPES = {
    "breadcrumbs": BREADCRUMBS,
    "breadcrumbs_ties": renamed(BREADCRUMBS, "breadcrumbs", "breadcrumbs_ties"),
    "karcher": KARCHER,
    "linear": LINEAR,
    "model_stock": MODEL_STOCK,
    "multislerp": MULTISLERP,
    "nearswap": NEARSWAP,
    "nuslerp": NUSLERP,
    "passthrough": PASSTHROUGH,
    "slerp": SLERP,
    "task_arithmetic": TASK_ARITHMETIC,
    "ties": TIES,
    "arcee_fusion": ARCEE_FUSION,
    "ram": RAM,
    "ramplus_tl": RAMPLUS_TL,
    "sce": SCE,
}

PRECISIONS = {
    "float32, bfloat16": "dtype: float32\nout_dtype: bfloat16\n",
    "bfloat16": "dtype: bfloat16\n",
    "float32": "dtype: float32\n",
    "stored": "compat: mergekit\n",
    # The others are tried on a few recipes.
    "float16": "dtype: float16\n",
    "float64": "dtype: float64\n",
    "bfloat16, float32": "dtype: bfloat16\nout_dtype: float32\n",
    "stored, float16": "compat: mergekit\nout_dtype: float16\n",
}
"""What is written after a recipe. ``compat`` is a key of seme's; mergekit ignores keys it does not know."""
