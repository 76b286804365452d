r"""Closed forms of the rates at which log-probabilities change in the unconstrained-features model.

One gradient flow on the loss moves the hidden states h and the unembedding W, all independent of each other. Everything
is at one time; ``slope`` is $\ell'(\ln \pi(y^+) - \ln \pi(y^-)) < 0$. Where the paper prints $-\ell$ (theorem 5, one
place of theorem 6, theorems 7 and 9), $-\ell'$ is meant, as stands here. Tokens are ids, single or in arrays.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def _errors(
    table: Float[Array, "v d"], states: Float[Array, "r k d"], targets: Int[Array, "r k"], mask: Int[Array, "r k"]
) -> Float[Array, "r k v"]:
    r"""$e_{y_k} - \pi(\cdot | x, y_{<k})$, 0 beyond the end of a response."""
    probs = jax.nn.softmax(jnp.einsum("rkd,vd->rkv", states, table), axis=-1)
    return jnp.where(mask[..., None] > 0, jax.nn.one_hot(targets, len(table), dtype=table.dtype) - probs, 0)


def rate_single_token(
    table: Float[Array, "v d"],
    hidden: Float[Array, "d"],
    chosen: Int[Array, ""],
    rejected: Int[Array, ""],
    slope: Float[Array, ""],
    *,
    sign: float | Float[Array, ""] = 1.0,
) -> Float[Array, ""]:
    r"""Rate of $\ln \pi(y^+)$, responses of one token, one example.

    $-\ell' [m - (1 - \pi_+ + \pi_-) \langle W_+, W_- \rangle - \sum_{z \ne +,-} \pi_z \langle W_z, W_+ - W_- \rangle]$
    with $m = (1 - \pi_+) |W_+|^2 + \pi_- |W_-|^2 + (1 - \pi_+ + \pi_-) |h|^2$. Through h alone it is the same without
    $|h|^2$, through W alone that term only.

    Args:
      table: W.
      hidden: h.
      chosen: The token preferred.
      rejected: The other one.
      slope: The loss's.
      sign: Of the terms that are not in m; anything but 1 is wrong.

    Returns:
      The rate.

    Reference:
      Razin et al. 2025, arXiv 2410.08847, theorem 4.
    """
    probs = jax.nn.softmax(table @ hidden)
    plus, minus = table[chosen], table[rejected]
    p, q = probs[chosen], probs[rejected]
    rest = probs.at[chosen].set(0).at[rejected].set(0)
    turn = 1 - p + q
    own = (1 - p) * plus @ plus + q * minus @ minus + turn * hidden @ hidden
    others = turn * plus @ minus + rest @ (table @ (plus - minus))
    return -slope * (own - sign * others)


def rate_through_unembedding(
    table: Float[Array, "v d"],
    hidden: Float[Array, "d"],
    chosen: Int[Array, ""],
    rejected: Int[Array, ""],
    slope: Float[Array, ""],
) -> Float[Array, ""]:
    r"""What theorem 4 has with hidden states fixed: $-\ell' (1 - \pi_+ + \pi_-) |h|^2$, never negative.

    Of one token: of several, or of several examples, it may be negative.

    Args:
      table: W.
      hidden: h.
      chosen: The token preferred.
      rejected: The other one.
      slope: The loss's.

    Returns:
      The rate of the chosen token's log-probability.

    Reference:
      Razin et al. 2025, arXiv 2410.08847, theorem 4.
    """
    probs = jax.nn.softmax(table @ hidden)
    return -slope * (1 - probs[chosen] + probs[rejected]) * hidden @ hidden


def rate_other_token(
    table: Float[Array, "v d"],
    hidden: Float[Array, "d"],
    token: Int[Array, ""],
    chosen: Int[Array, ""],
    rejected: Int[Array, ""],
    slope: Float[Array, ""],
) -> Float[Array, ""]:
    r"""Rate of $\ln \pi(z)$ for a token z that is neither the chosen nor the rejected one.

    $-\ell' [\langle W_z, W_+ - W_- \rangle + c]$ with
    $c = (\pi_- - \pi_+) |h|^2 - \sum_{z'} \pi_{z'} \langle W_{z'}, W_+ - W_- \rangle$, the same for all z: where the
    mass goes is decided by the first term.

    Args:
      table: W.
      hidden: h.
      token: z.
      chosen: The token preferred.
      rejected: The other one.
      slope: The loss's.

    Returns:
      The rate.

    Reference:
      Razin et al. 2025, arXiv 2410.08847, theorem 5.
    """
    probs = jax.nn.softmax(table @ hidden)
    along = table @ (table[chosen] - table[rejected])
    shared = (probs[rejected] - probs[chosen]) * hidden @ hidden - probs @ along
    return -slope * (along[token] + shared)


def rate_chosen(
    table: Float[Array, "v d"],
    states: Float[Array, "2 k d"],
    targets: Int[Array, "2 k"],
    mask: Int[Array, "2 k"],
    slope: Float[Array, ""],
    *,
    sign: float | Float[Array, ""] = 1.0,
) -> Float[Array, ""]:
    r"""Rate of $\ln \pi(y^+)$, responses of several tokens that differ in the first, one example.

    $-\ell' [m + S - \sum_{kk'} a^-_{kk'} \langle h^+_k, h^-_{k'} \rangle + \sum_{kk'} a^+_{kk'} \langle h^+_k, h^+_{k'}
    \rangle]$, $a^\pm_{kk'} = \langle e_{y^+_k} - \pi(\cdot | x, y^+_{<k}), e_{y^\pm_{k'}} - \pi(\cdot | x, y^\pm_{<k'})
    \rangle$, S as the last two terms of theorem 4 for the first tokens, and
    $m = (1 - \pi_+) |W_{y^+_1}|^2 + \pi_- |W_{y^-_1}|^2 + \sum_{k \ge 2} |W_{y^+_k} - \mu_k|^2$ with
    $\mu_k = E_{z \sim \pi(\cdot | x, y^+_{<k})} W_z$. With all a set to 1 the sums are minus the CHES score.

    Args:
      table: W.
      states: Hidden states of the chosen and the rejected response; the first state of both is the prompt's.
      targets: Their tokens.
      mask: 1 at their tokens.
      slope: The loss's.
      sign: Of S; anything but 1 is wrong.

    Returns:
      The rate.

    Reference:
      Razin et al. 2025, arXiv 2410.08847, theorem 6.
    """
    errors = _errors(table, states, targets, mask)
    probs = jax.nn.softmax(jnp.einsum("kd,vd->kv", states[0], table), axis=-1)
    first, second = targets[0, 0], targets[1, 0]
    plus, minus = table[first], table[second]
    p, q = probs[0, first], probs[0, second]
    rest = probs[0].at[first].set(0).at[second].set(0)
    later = jnp.where(mask[0, 1:, None] > 0, table[targets[0, 1:]] - probs[1:] @ table, 0)
    own = (1 - p) * plus @ plus + q * minus @ minus + (later**2).sum()
    similarity = -(1 - p + q) * plus @ minus - rest @ (table @ (plus - minus))
    alpha = jnp.einsum("kv,rjv->rkj", errors[0], errors)
    inner = jnp.einsum("kd,rjd->rkj", states[0], states)
    through_table = (alpha * inner).sum(axis=(1, 2))
    return -slope * (own + sign * similarity - through_table[1] + through_table[0])


def rate_response(
    table: Float[Array, "v d"],
    states: Float[Array, "3 k d"],
    targets: Int[Array, "3 k"],
    mask: Int[Array, "3 k"],
    slope: Float[Array, ""],
) -> Float[Array, ""]:
    r"""Rate of $\ln \pi(z)$ for any response z whose first token is neither $y^+_1$ nor $y^-_1$.

    $-\ell' [\langle W_{z_1}, W_{y^+_1} - W_{y^-_1} \rangle + c - \sum b^-_{kk'} \langle h^z_k, h^-_{k'} \rangle
    + \sum b^+_{kk'} \langle h^z_k, h^+_{k'} \rangle]$, b as a of theorem 6 with z in the place of its first $y^+$, and
    $c = -\sum_{z'} \pi(z' | x) \langle W_{z'}, W_{y^+_1} - W_{y^-_1} \rangle$.

    Args:
      table: W.
      states: Hidden states of the chosen response, the rejected one and z; the first state of all is the prompt's.
      targets: Their tokens.
      mask: 1 at their tokens.
      slope: The loss's.

    Returns:
      The rate.

    Reference:
      Razin et al. 2025, arXiv 2410.08847, theorem 7.
    """
    errors = _errors(table, states, targets, mask)
    along = table @ (table[targets[0, 0]] - table[targets[1, 0]])
    shared = -jax.nn.softmax(table @ states[0, 0]) @ along
    weights = jnp.einsum("kv,rjv->rkj", errors[2], errors[:2])
    inner = jnp.einsum("kd,rjd->rkj", states[2], states[:2])
    through_table = (weights * inner).sum(axis=(1, 2))
    return -slope * (along[targets[2, 0]] + shared - through_table[1] + through_table[0])


def rates_across_examples(
    table: Float[Array, "v d"],
    hidden: Float[Array, "n d"],
    tokens: Int[Array, "n"],
    chosen: Int[Array, "n"],
    rejected: Int[Array, "n"],
    slopes: Float[Array, "n"],
    *,
    sign: float | Float[Array, ""] = 1.0,
) -> Float[Array, "n"]:
    r"""Rates of $\ln \pi(z_i | x_i)$ under the mean loss of n examples of one token with distinct prompts.

    The example's own term, of theorem 4 or 5, over n, and $\sum_{j \ne i} (-\ell'_j / n)\, \alpha_j \langle h_i, h_j
    \rangle$ of the others, $\alpha_j = 1[z = y^+_j] - 1[z = y^-_j] + \pi(y^-_j | x_i) - \pi(y^+_j | x_i)$. Theorem
    9 has what is the same for all z in a constant of its own.

    Args:
      table: W.
      hidden: h of each prompt.
      tokens: z of each prompt: the chosen token (theorem 8), or one that is neither (theorem 9).
      chosen: The tokens preferred.
      rejected: The other ones.
      slopes: The loss's, an example each.
      sign: Of the terms of others; anything but 1 is wrong.

    Returns:
      The rates.

    Reference:
      Razin et al. 2025, arXiv 2410.08847, theorems 8 and 9.
    """
    n = len(tokens)
    own_chosen = jax.vmap(rate_single_token, (None, 0, 0, 0, 0))(table, hidden, chosen, rejected, slopes)
    own_other = jax.vmap(rate_other_token, (None, 0, 0, 0, 0, 0))(table, hidden, tokens, chosen, rejected, slopes)
    own = jnp.where(tokens == chosen, own_chosen, own_other)
    probs = jax.nn.softmax(jnp.einsum("nd,vd->nv", hidden, table), axis=-1)
    preferred, dispreferred = ((tokens[:, None] == ids[None]).astype(table.dtype) for ids in (chosen, rejected))
    alpha = preferred - dispreferred + probs[:, rejected] - probs[:, chosen]
    others = jnp.where(jnp.eye(n, dtype=bool), 0, alpha * (hidden @ hidden.T))
    return (own - sign * others @ slopes) / n


def gain_of_sft(gram: Float[Array, "r r"], weight: float) -> Float[Array, ""]:
    r"""What an added loss $-\lambda \ln \pi(y^+)$ adds to the rate of $\ln \pi(y^+)$.

    $\lambda |\nabla \ln \pi(y^+)|^2$, of any differentiable model; never negative.

    Args:
      gram: Inner products of the gradients of log-probabilities, chosen first.
      weight: $\lambda$.

    Returns:
      The change of the rate.

    Reference:
      Razin et al. 2025, arXiv 2410.08847, proposition 1.
    """
    return weight * gram[0, 0]


def rate_weighted(
    unweighted: Float[Array, "..."],
    chosen_norm: Float[Array, "..."],
    slope: Float[Array, "..."],
    slopes: Float[Array, "... 2"],
) -> Float[Array, "..."]:
    r"""Rate of $\ln \pi(y^+)$ under a loss $\mu(\lambda^+ \ln \pi(y^+) - \lambda^- \ln \pi(y^-))$, from another's.

    $\rho E + \gamma |\nabla \ln \pi(y^+)|^2$ with E the rate under a loss of the margin,
    $\rho = \lambda^- \mu' / \ell'$ and $\gamma = -(\lambda^+ - \lambda^-) \mu'$. Of any differentiable model. Only the
    slopes $\lambda^+ \mu'$ and $-\lambda^- \mu'$ enter, so that it holds of any loss of the two log-probabilities.

    Args:
      unweighted: E.
      chosen_norm: $|\nabla \ln \pi(y^+)|^2$.
      slope: $\ell'$.
      slopes: The weighted loss's, by $\ln \pi(y^+)$ and by $\ln \pi(y^-)$.

    Returns:
      The rate.

    Reference:
      Razin et al. 2025, arXiv 2410.08847, proposition 2.
    """
    return -slopes[..., 1] / slope * unweighted - slopes.sum(axis=-1) * chosen_norm
