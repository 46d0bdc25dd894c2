"""Gates that draw: noise on the logits before the largest are taken."""

from __future__ import annotations

import numpy as np

from moesim.routing.gates.gate import GateChoice
from moesim.routing.gates.routed import Routed, TokenScores, best, softmax
from moesim.routing.gates.topk import pick


def noisy_topk(scores: TokenScores, how: GateChoice, rng: np.random.Generator) -> Routed:
    """Logits plus Gaussian noise, the top_k, a softmax over those (Shazeer et al., arXiv:1701.06538, section 2.1).

    There the noise's scale is learned for each token and expert; here it is one number, `noise`.
    """
    noisy = scores.logits + how.noise * rng.standard_normal(scores.logits.shape)
    ids = best(noisy, how.top_k)
    return Routed(ids, softmax(np.take_along_axis(noisy, ids, axis=1)), scores.experts)


def gumbel_topk(scores: TokenScores, how: GateChoice, rng: np.random.Generator) -> Routed:
    """Logits over `temperature` plus Gumbel noise: top_k draws without replacement by softmax(logits / temperature)
    (Kool, van Hoof and Welling, arXiv:1903.06059). Weighed by the softmax without noise.
    """
    raised = scores.logits / how.temperature
    return pick(scores, raised + rng.gumbel(size=raised.shape), softmax(raised), how)
