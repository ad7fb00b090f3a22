"""When to switch without thresholds: at the first window's end at which a switch is expected to lose less
than all parameters would lose by training for no more time than the switched run takes.

The paper (arXiv 2509.21619) leaves open how to find its thresholds online. This rule compares two expected
final losses, both from a loss law fitted to the full phase's log (arXiv 2408.11029):

    L = L0 + A · S1^-α - C · S2        S1: the sum of the learning rates so far; S2: what has been annealed

With L(T) for all parameters over the whole run of T epochs, w epochs of warmup, costs c in full epochs, and
`left` = L(e + w) - L(T), the learning that is left at the freeze:

    switched after e:   L(T) + shortfall · left²
    equal time:         L'(T') with T' = e + w · c_warmup + (T - e - w) · c_lora, its own schedule over T'

Of the learning that is left adapters deliver the share 1 - shortfall · left: the more there is, the less of
it fits into their few directions. So docs/method.md found it, where a share that is the same at every switch
was right at one of them only. A fork that switched early enough for it to be seen calibrates `shortfall`, in
1 / loss.

The log is the state: these are functions of epoch records, and keep nothing. `get_rates(cfg, n)` gives the
learning rate of each step that a run of n steps with all parameters would have.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from scipy.optimize import minimize_scalar, nnls

GetRates = Callable[..., list[float]]

# How long a fall of the rate goes on to lower the loss: 1 / (1 - 0.99) = 100 steps. The law's authors take
# 0.999, for language models of 20,000 steps and more. On the logs of docs/study, of 2232 steps, fits up to
# epoch 14 expect with that a final loss that is 0.04 to 0.17 too low, and with 0.99 one within 0.05.
MEMORY = 0.99
ALPHAS = np.geomspace(0.05, 2.0, 25)  # where the best exponent is looked for
LEAST_EPOCHS = 6  # that a fit needs, for its four numbers


class ForecastSettings(Protocol):
    """What the forecast depends on: train.Config has these fields."""

    epochs: int  # T
    window_epochs: int  # a forecast is made at each window's end
    num_windows: int  # so many fits in a row must agree
    lr_warmup_steps: int  # epochs that begin in the learning rate's warmup are not fitted
    lora_warmup_epochs: int  # w
    warmup_cost: float | None  # an epoch of the warmup, in epochs with all parameters
    lora_cost: float | None  # and one of the lora phase
    forecast_shortfall: float | None  # loss that adapters leave undelivered, over (loss left at the freeze)²


class LossLaw(NamedTuple):
    """The four numbers of the loss law, all of them at least 0."""

    L0: float
    A: float
    alpha: float
    C: float

    def get_loss(self, S1: float, S2: float) -> float:
        return self.L0 + self.A * S1**-self.alpha - self.C * S2


class Outlook(NamedTuple):
    """What is expected of a switch after `epoch`, by the newest fit; and what the last fits say of it."""

    epoch: int
    law: LossLaw | None  # None: too few epochs for a fit
    final: float  # loss of all parameters after the whole run
    switched: float  # final loss if switched here
    equal_epochs: float  # T', for which all parameters would train in the switched run's time
    equal: float  # their loss after it
    gains: tuple[float, ...]  # equal - switched, by each of the last num_windows fits, the newest last
    verdict: str  # "too early", "wait", "fits disagree", "switch"


def get_areas(rates: np.ndarray, warmup_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(S1, S2) after each of the steps with these learning rates.

    S1 is their sum so far. S2 is the sum of m_i = MEMORY · m_(i-1) + (the fall of the rate to step i); falls
    count from the peak on, that is after the warmup's rise.
    """
    falls = np.zeros(len(rates))
    falls[1:] = rates[:-1] - rates[1:]
    falls[: warmup_steps + 1] = 0.0
    momentum, m = np.zeros(len(rates)), 0.0
    for i, fall in enumerate(falls):
        m = MEMORY * m + fall
        momentum[i] = m
    return np.cumsum(rates), np.cumsum(momentum)


def get_logged_rates(epochs: list[dict], rates: np.ndarray) -> np.ndarray:
    """The learning rate of each step so far: `rates`, those of the settings, and where the log has another
    one at an epoch's end, because a run was resumed with other settings, as many times more or less."""
    ends = np.array([record["step"] for record in epochs])
    own = rates[ends - 1]
    logged = np.array([record["lr"] for record in epochs])
    ratios = np.divide(logged, own, out=np.ones(len(ends)), where=own > 0)
    return rates[: ends[-1]] * np.interp(np.arange(1, ends[-1] + 1), ends, ratios)


def fit_law(S1: np.ndarray, S2: np.ndarray, losses: np.ndarray) -> LossLaw:
    """The loss law nearest to these epochs' mean losses (n,), by least squares. S1, S2: (n, steps per epoch).

    For a given α the law is linear in the other three, which non-negative least squares finds, whatever the
    start; so only α is searched, on a grid and then between its neighbours.
    """

    def solve(alpha: float) -> tuple[np.ndarray, float]:
        powers = (S1**-alpha).mean(axis=1)  # (n,), as the losses are means over the epoch's steps
        columns = np.stack([np.ones(len(losses)), powers, -S2.mean(axis=1)], axis=1)  # (n, 3)
        scales = np.abs(columns).max(axis=0)
        scales[scales == 0] = 1.0  # nothing annealed yet
        numbers, distance = nnls(columns / scales, losses)
        return numbers / scales, distance

    best = min(range(len(ALPHAS)), key=lambda i: solve(ALPHAS[i])[1])
    between = ALPHAS[max(best - 1, 0)], ALPHAS[min(best + 1, len(ALPHAS) - 1)]
    alpha = minimize_scalar(
        lambda a: solve(a)[1], bounds=between, method="bounded", options={"xatol": 1e-6}
    ).x
    (L0, A, C), _ = solve(alpha)
    return LossLaw(float(L0), float(A), float(alpha), float(C))


def get_outlook(epochs: list[dict], cfg: ForecastSettings, get_rates: GetRates) -> Outlook:
    """What is expected of a switch after the last of these records of a full phase, a window's end.

    It says "switch" only where the laws fitted up to this and to the num_windows - 1 windows' ends before all
    expect a gain: while they say different things the log is too short to tell. Raises FloatingPointError for
    a loss that is not finite.
    """
    count = len(epochs)
    bad = [record["epoch"] for record in epochs if not math.isfinite(record["train_loss"])]
    if bad:
        raise FloatingPointError(f"epoch {bad[0]}: the training loss is not finite")
    steps_per_epoch = epochs[0]["step"] // epochs[0]["epoch"]
    rates = np.array(get_rates(cfg, cfg.epochs * steps_per_epoch))
    rates[: epochs[-1]["step"]] = get_logged_rates(epochs, rates)
    S1, S2 = get_areas(rates, cfg.lr_warmup_steps)
    freeze = min(count + cfg.lora_warmup_epochs, cfg.epochs)
    equal_epochs = count + (freeze - count) * cfg.warmup_cost + (cfg.epochs - freeze) * cfg.lora_cost
    equal_steps = max(round(equal_epochs * steps_per_epoch), 1)
    equal_S1, equal_S2 = get_areas(np.array(get_rates(cfg, equal_steps)), cfg.lr_warmup_steps)

    def expect(law: LossLaw) -> tuple[float, float, float]:
        """(final, switched, equal) by this law."""
        final = law.get_loss(S1[-1], S2[-1])
        left = law.get_loss(S1[freeze * steps_per_epoch - 1], S2[freeze * steps_per_epoch - 1]) - final
        return (
            final,
            final + cfg.forecast_shortfall * left * abs(left),
            law.get_loss(equal_S1[-1], equal_S2[-1]),
        )

    first = math.ceil(cfg.lr_warmup_steps / steps_per_epoch)  # the epochs before it are not fitted
    losses = np.array([record["train_loss"] for record in epochs])
    laws = []
    for end in range(count, first + LEAST_EPOCHS - 1, -cfg.window_epochs):
        if len(laws) == cfg.num_windows:
            break
        steps = slice(first * steps_per_epoch, end * steps_per_epoch)
        shape = (end - first, steps_per_epoch)
        laws.insert(0, fit_law(S1[steps].reshape(shape), S2[steps].reshape(shape), losses[first:end]))
    if not laws:
        return Outlook(count, None, math.nan, math.nan, equal_epochs, math.nan, (), "too early")
    expected = [expect(law) for law in laws]
    gains = tuple(float(equal - switched) for _, switched, equal in expected)
    final, switched, equal = map(float, expected[-1])
    verdict = judge(gains, cfg.num_windows)
    if freeze == cfg.epochs:  # no epoch is left for adapters alone
        verdict = "wait"
    return Outlook(count, laws[-1], final, switched, equal_epochs, equal, gains, verdict)


def judge(gains: tuple[float, ...], needed: int) -> str:
    """The verdict on a switch, from the gains that the last fits expect of it; so many are `needed`."""
    if len(gains) < needed:
        return "too early"
    if all(gain > 0 for gain in gains):
        return "switch"
    if all(gain <= 0 for gain in gains):
        return "wait"
    return "fits disagree"


def measure_shortfall(fork: list[dict], full: list[dict], window_epochs: int) -> float:
    """`forecast_shortfall` from a run that was forked off another and switched: how much higher its training
    loss ended, in the last epochs that both have, over the square of what all parameters took off from the
    freeze to there. 0 for a fork that ended lower.

    `fork`, `full`: epoch records. The ends are means over the last window_epochs epochs, the loss at the
    freeze that of one epoch. Raises ValueError where the fork's lora phase and the full run share less than
    two windows, or nothing was left to learn.
    """
    losses = {record["epoch"]: record["train_loss"] for record in full if record["phase"] == "full"}
    shared = [record for record in fork if record["phase"] == "lora" and record["epoch"] in losses]
    if len(shared) < 2 * window_epochs:
        raise ValueError(
            f"{len(shared)} epochs after the freeze in common, a calibration needs two windows of "
            f"{window_epochs}"
        )
    freeze, last = shared[0]["epoch"] - 1, shared[-window_epochs:]
    if freeze not in losses:
        raise ValueError(f"the full run's log lacks epoch {freeze}, after which the fork's base is frozen")
    fork_end = np.mean([record["train_loss"] for record in last])
    full_end = np.mean([losses[record["epoch"]] for record in last])
    left = losses[freeze] - full_end
    if not left > 0:
        raise ValueError(
            f"all parameters learned nothing after epoch {freeze}: {losses[freeze]:.4f} -> {full_end:.4f}"
        )
    return max(float((fork_end - full_end) / left**2), 0.0)
