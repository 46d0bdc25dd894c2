"""Any JSON object is either a model or one line of BadInput."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import BadInput
from moesim.spec.hf import bundled_model, from_hf

DEEPSEEK = bundled_model("deepseek-ai/DeepSeek-V3").config
GPT_OSS = bundled_model("openai/gpt-oss-120b").config
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.lists(st.integers(-2, 70), max_size=70),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(base=st.sampled_from([DEEPSEEK, GPT_OSS]), data=st.data())
def test_a_damaged_config_never_ends_in_a_traceback(base: dict[str, Any], data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(base)), min_size=1, max_size=3))
    config = {**base, **{key: data.draw(VALUES) for key in keys}}
    try:
        model = from_hf(config, id="fuzz", source="fuzz.json")
    except BadInput as error:
        assert "fuzz.json" in error.line()
        assert "\n" not in error.line()
    else:
        assert model.parameters() > 0
