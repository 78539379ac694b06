"""The registry: what a signature says about a method's parameters."""

import pytest

from seme.errors import ConfigError
from seme.methods import PerExpert, get, method, methods
from seme.methods import _registry as registry


def test_methods_of_this_version():
    assert list(methods()) == [
        "arcee_fusion",
        "breadcrumbs",
        "breadcrumbs_ties",
        "dare_linear",
        "dare_ties",
        "della",
        "della_linear",
        "iso_c",
        "karcher",
        "linear",
        "model_stock",
        "multislerp",
        "nearswap",
        "nuslerp",
        "passthrough",
        "ram",
        "ramplus_tl",
        "sce",
        "seme",
        "slerp",
        "task_arithmetic",
        "ties",
        "tsv_m",
    ]


def test_parameters_defaults_and_scopes_are_mergekits():
    ties = {p.name: (p.kind, p.scope, p.default) for p in get("ties").params}
    assert ties == {
        "weight": (float, "expert", None),
        "density": (float, "expert", 1.0),
        "normalize": (bool, "shared", True),
        "rescale": (bool, "shared", False),
        "int8_mask": (bool, "shared", False),
        "lambda": (float, "shared", 1.0),
    }
    crumbs = {p.name: (p.kind, p.scope, p.default) for p in get("breadcrumbs").params}
    assert crumbs == {**ties, "gamma": (float, "expert", 0.01), "normalize": (bool, "shared", False)}
    assert {p.name: (p.kind, p.scope, p.default) for p in get("breadcrumbs_ties").params} == crumbs
    for name in ("dare_linear", "dare_ties"):
        dare = {p.name: (p.kind, p.scope, p.default) for p in get(name).params}
        assert dare == {**ties, "normalize": (bool, "shared", False), "rescale": (bool, "shared", True)}
    for name in ("della", "della_linear"):
        della = {p.name: (p.kind, p.scope, p.default) for p in get(name).params}
        normalize = (bool, "shared", name == "della")
        assert della == {**dare, "epsilon": (float, "expert", 0.15), "normalize": normalize}
    assert get("task_arithmetic").param("normalize").default is False
    assert get("linear").param("weight").scope == "model"
    assert (get("slerp").min_inputs, get("slerp").max_inputs) == (2, 2)


def test_every_parameter_is_described():
    for found in methods().values():
        assert found.summary
        assert found.source.startswith("https://")
        assert all(p.doc for p in found.params)


def test_unknown_method_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"merge_method: unknown method 'tiess'; did you mean 'ties'\?"):
        get("tiess")


def test_registering(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    register = method("third_party", reference=lambda tensors: tensors[0], source="https://example.org")

    @register
    def merge(group, *, weight: PerExpert, sharp: bool = False):
        """A method.

        Args:
            weight: of each.
            sharp: or blunt,
                in two lines.
        """

    found = get("third_party")
    assert [(p.name, p.scope, p.doc) for p in found.params] == [
        ("weight", "expert", "of each."),
        ("sharp", "shared", "or blunt, in two lines."),
    ]
    with pytest.raises(ConfigError, match="registered twice"):
        register(merge)


class Point:
    """An entry point of another package."""

    def __init__(self, name, load):
        self.name, self.value, self.load = name, f"package:{name}", load


def test_methods_of_other_packages(monkeypatch):
    """One that registers is there; one that breaks costs a warning and nothing else."""

    def load():
        def merge(group, *, weight: PerExpert):
            """A method.

            Args:
                weight: of each.
            """

        method("third_party", reference=lambda tensors: tensors[0], source="https://example.org")(merge)

    def broken():
        raise ImportError("No module named 'missing'")

    points = [Point("broken", broken), Point("third_party", load)]
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "_discovered", False)
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "seme.methods" else [])
    with pytest.warns(UserWarning, match="seme: merge method broken of package:broken is left out: No module named"):
        found = methods()
    assert "third_party" in found
    assert {"linear", "slerp", "task_arithmetic", "ties"} < set(found)


def test_how_many_models_a_method_takes():
    for name, count, message in (
        ("slerp", 1, "models: slerp takes 2 models, base included; found 1"),
        ("slerp", 3, "models: slerp takes 2 models, base included; found 3"),
        ("linear", 0, "models: linear takes 1 or more models, base included; found 0"),
    ):
        with pytest.raises(ConfigError) as e:
            get(name).check_inputs(count)
        assert str(e.value) == message
    get("linear").check_inputs(100)
    with pytest.raises(ConfigError, match="models: passthrough takes 1 model, base included; found 2"):
        get("passthrough").check_inputs(2)


def test_an_optional_base_is_not_counted():
    get("nuslerp").check_inputs(2, base=False)
    get("nuslerp").check_inputs(3, base=True)
    for count, base in ((3, False), (2, True)):
        found = count - base
        with pytest.raises(ConfigError, match=f"nuslerp takes 2 models, base not included; found {found}"):
            get("nuslerp").check_inputs(count, base)


def test_a_parameter_without_description_or_with_another_type_is_refused():
    def undescribed(group, *, weight: PerExpert):
        """Nothing."""

    def wrong(group, *, weight: dict):
        """Something.

        Args:
            weight: a dictionary.
        """

    for function, message in ((undescribed, "weight is not described"), (wrong, "is not bool, int, float")):
        with pytest.raises(TypeError, match=message):
            method("bad", reference=None, source="")(function)
