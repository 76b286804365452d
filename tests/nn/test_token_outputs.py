import jax
import jax.numpy as jnp
import numpy as np

from jaxft.nn import make_mlm_logits
from jaxft.nn.token_outputs import make_token_log_probs


def test_entries_are_the_log_probabilities_of_the_input_itself(small, tokens):
    logits = np.asarray(make_mlm_logits(small.config)(small.params, small.batch), np.float64)
    ids = np.asarray(small.batch.input_ids)
    expected = np.zeros(ids.shape)
    for n, t in zip(*np.nonzero(tokens), strict=True):
        z = np.exp(logits[n, t] - logits[n, t].max())
        expected[n, t] = np.log(z[ids[n, t]] / z.sum())
    found = make_token_log_probs(small.config)(small.params, small.batch)
    np.testing.assert_allclose(found, expected, atol=5e-6)
    assert (np.asarray(found)[tokens] < 0).all()


def test_special_tokens_count_like_padding(bert, tokens):
    special = int(bert.batch.input_ids[0, 1])
    plain = np.asarray(make_token_log_probs(bert.config)(bert.params, bert.batch))
    found = np.asarray(make_token_log_probs(bert.config, special_ids=[special])(bert.params, bert.batch))
    left_out = np.asarray(bert.batch.input_ids) == special
    assert left_out[tokens].any()
    np.testing.assert_array_equal(found, np.where(left_out, 0, plain))


def test_entries_at_padding_have_no_gradient(bert, tokens):
    """Neither their own nor, with finite logits everywhere, one that is not a number."""
    f = make_token_log_probs(bert.config)
    one = jax.tree.map(lambda leaf: leaf[1:2], bert.batch)
    gradient = jax.jit(jax.grad(lambda params, t: f(params, one)[0, t]))
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient(bert.params, 5)))
    assert any(leaf.any() for leaf in jax.tree.leaves(gradient(bert.params, 3)))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(bert.params, 3)))
