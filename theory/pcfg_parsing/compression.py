"""The construction with fewer dimensions: a linear map of the residual stream, as weights."""

import numpy as np
from jaxtyping import Array, Float

from jaxft.core.checks import require
from theory.pcfg_parsing.construction import Construction


def project_stream(
    model: Construction, basis: Float[Array | np.ndarray, "s r"]
) -> tuple[Construction, Float[np.ndarray, "wide narrow"]]:
    r"""The model that keeps r numbers in place of each slot's s nonterminals, in the inside and the outside chart.

    With T the columns of the narrow stream in the wide one, $x \approx T x'$: what is read is $T^\top Q$, $T^\top K$,
    $T^\top V$, what is written $O\,T$. Scores are computed for every nonterminal as before; what is kept of them is
    their projection. It is ``projected_inside_outside`` with one basis for all widths: a slot of this layout is of
    another width at every token. The width of the charts falls to (r + q)(L + 1) + 2r(L - 1).

    Args:
      model: A construction of soft attention without steps (directional or low-rank heads).
      basis: Orthonormal columns.

    Returns:
      The narrow model (its coordinates are those of the wide stream), and T: read it from ``hidden @ T.T``.

    Raises:
      UserError: Hard or symmetric attention, or a basis of another number of nonterminals.
    """
    where, at, columns = "project_stream", model.coordinates, np.asarray(basis, np.float64)
    steps = any(stage.steps for stage in model.config.stages)
    rule = "the model must be of soft attention without steps"
    require(not steps, where, rule, model.config.attention, "Use directional or low-rank heads")
    s, (rows, rank) = len(at.forward), columns.shape
    require(rows == s, where, f"the basis must have {s} rows", columns.shape, "Make it for the model's grammar")
    blocks = [(block[:s, k], rank) for block in (at.left, at.forward, at.backward) for k in range(block.shape[1])]
    charts = np.concatenate([block for block, _ in blocks])
    others = np.setdiff1d(np.arange(at.width), charts)
    narrow = np.zeros((at.width, len(others) + rank * len(blocks)))
    narrow[others, np.arange(len(others))] = 1
    for i, (block, _) in enumerate(blocks):
        start = len(others) + rank * i
        narrow[block, start : start + rank] = columns
    params = {}
    for name, part in model.params.items():
        mapped = {}
        for key, value in part.items():
            wide = np.asarray(value)
            if name == "embeddings" or key == "output":
                mapped[key] = wide @ narrow.astype(wide.dtype)
            elif key in ("query", "key", "value"):
                mapped[key] = np.einsum("dn,hde->hne", narrow.astype(wide.dtype), wide)
            else:
                mapped[key] = wide
        params[name] = mapped
    config = model.config.__class__(
        model.config.vocab_size, narrow.shape[1], model.config.max_positions, model.config.stages
    )
    return model._replace(config=config, params=params), narrow
