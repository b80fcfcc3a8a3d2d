"""Models and batches for layouts to carry: small, with every kind of number that a rule looks at."""

from hypothesis import strategies as st

from rayfold.parallel.limits import Load, ModelLimits


@st.composite
def loads(draw: st.DrawFn) -> Load:
    """Any of them, odd numbers too, and now and then a model without a plan."""
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    model = ModelLimits(
        family="llama",
        layers=draw(st.integers(1, 12)),
        heads=kv_heads * draw(st.sampled_from([1, 2, 3, 4])),
        kv_heads=kv_heads,
        ffn_dim=draw(st.sampled_from([5, 9, 63, 64])),
        vocab_size=draw(st.sampled_from([None, 5, 257])),
        seq_len=draw(st.sampled_from([24, 30, 32, 36, 45, 64])),
    )
    return Load(
        model=draw(st.sampled_from([model, model, model, None])),
        batch_size=draw(st.sampled_from([1, 4, 5, 8, 12, 16, 30, 48])),
        micro_size=draw(st.sampled_from([0, 0, 1, 2, 3])),
        compiled=draw(st.booleans()),
    )
