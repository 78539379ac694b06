"""seme's methods in sentence-transformers, which merges through mergekit."""

import pytest
import torch

pytest.importorskip("mergekit", reason="mergekit is not installed; it comes with the extra 'test'")
st = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is not installed; it comes with the extra 'test'"
)

import seme
from seme import native
from seme.integrations import mergekit as integration
from tests.checkpoints import tokenizer

pytestmark = pytest.mark.skipif(native.why_not("_C") is not None, reason="seme._C is not built: SEME_NATIVE=1")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A base encoder and two fine-tunes of it, of random weights, made on the spot."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=61, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    tokenizer(folder, [f"t{i}" for i in range(61)])
    found = []
    for i in range(3):
        transformer = Transformer(str(folder))
        transformer.tokenizer.pad_token = "t0"
        model = st.SentenceTransformer(modules=[transformer, Pooling(24)], device="cpu")
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.002 * i * torch.randn(weight.shape, generator=generator)
        found.append(model)
    return found


@pytest.mark.parametrize(("method", "parameters"), [("seme", {}), ("ties", {"density": 0.5}), ("sce", {})])
def test_merge(method, parameters, encoders):
    base, *tuned = encoders
    integration.install()
    try:
        merged = st.SentenceTransformer.merge(tuned, method=method, base_model=base, parameters=parameters)
    finally:
        integration.uninstall()
    states = [m.state_dict() for m in (*tuned, base)]
    given = {"weight": 1.0, **parameters} if method != "sce" else parameters
    expected = seme.merge_state_dicts(states, method, base=2, parameters=given, compat="mergekit")
    for name, value in merged.state_dict().items():
        # The order of the sums in matrix products; element by element all is equal.
        assert (value.double() - expected[name].double()).abs().max() <= (1e-5 if method == "seme" else 0), name
    assert merged.encode(["t1 t2", "t3"]).shape == (2, 24)
