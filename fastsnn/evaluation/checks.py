"""Checks of an evaluation: signs that a model is less robust than its figures (Carlini et al. 2019; Athalye et al. 2018; AutoAttack's flags).

Each has a verdict: ok, suspicious, or not tested with what would test it. Some compare the rows of the evaluation; others run
attacks of their own (`probes`) on some of the images. Shares are judged by their 95 % intervals, pairs of attacks by a sign test.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attacks import ATTACKS, Attack
from .forward import evaluating
from .results import Check, Result, all_right, size_text, threat, wilson, within

__all__ = ["CHECKS", "chosen", "main_attack", "probes", "verdicts"]

#: A share of samples that an attack may find beyond another before it is told: twice the steps, other starts, no gradient.
LITTLE = 0.02
#: What random noise may fool of the samples that are classified right.
NOISE = 0.05
#: What may be left of a model without a bound on the perturbation.
NOTHING = 0.01
#: How far the per-sample worst case may lie below the attack through the surrogate of training.
MASKED = 0.05
#: A size is telling while an attack leaves so many of the samples.
TELLING = 0.1
#: Queries of the square attack that `gradient-free` runs.
QUERIES = 100


@dataclass(frozen=True)
class Evidence:
    """What the checks look at.

    scores: the model's outputs in two passes over the same clean images. main: the name of the attack that stands for the suite's plain,
    iterative attack with gradients, at the size where the probes were run. probed: of each probe, for each sample tried, whether the
    model was right. places: the images of the checks.
    """

    scores: tuple[Tensor, Tensor]
    attacks: Mapping[str, Attack]
    results: Mapping[str, Result]
    main: str | None
    probed: Mapping[str, Mapping[int, bool]]
    places: Sequence[int]

    def pairs(self, fits: Callable[[Attack, Attack], bool]) -> list[tuple[str, str]]:
        """Names of attacks that tried every sample and of which the first should find at least what the second does."""
        whole = [name for name in self.attacks if not self.results[name].skips]
        return [(a, b) for a in whole for b in whole if a != b and fits(self.attacks[a], self.attacks[b])]


def probes(attacks: Mapping[str, Attack], results: Mapping[str, Result], count: int, pixels: int, limit: int) -> dict[str, tuple[Attack, list[int]]]:
    """The attacks that the checks need beside the suite's, each with the samples to run it on: at most `limit`, chosen once.

    Samples that an attack has fooled already are left out where only what it finds in addition counts.
    """
    main = main_attack(attacks, results)
    if main is None or limit < 1:
        return {}
    attack, places = attacks[main], chosen(count, limit)
    clean = results["clean"].correct
    standing = all_right(within(results, attack.norm, attack.eps))
    rest = [place for place in places if standing[place]]
    found = {"noise": (ATTACKS["uniform"](attack.eps, norm=attack.norm, seed=attack.seed), [place for place in places if clean[place]])}
    found["more-steps"] = _changed(attack, steps=2 * attack.steps), rest
    if getattr(attack, "random_start", True) and attack.seed is not None:
        again = copy.copy(attack)
        again.seed = attack.seed + 1 if attack.seed < 2**63 - 1 else 0
        found["more-restarts"] = again, rest
    whole = [other for name, other in attacks.items() if not results[name].skips]
    if not any(_steps_more(many, one) for many in whole for one in whole):
        found["iterative"] = ATTACKS["fgsm"](attack.eps, norm=attack.norm, adjoint=attack.adjoint, seed=attack.seed, eot=attack.eot), places
    if not any(_is_larger(large, small) for large in whole for small in whole):
        found["larger-eps"] = _changed(attack, eps=attack.eps / 2), places
    strongest = next((other for other in attacks.values() if other.name == "ensemble" and not other.single_step), None)
    widest = 1.0 if attack.norm == "linf" else math.sqrt(pixels)
    if strongest is not None:
        endless: Attack = ATTACKS["ensemble"](widest, base="bim", steps=20, norm=attack.norm, members=strongest.members, seed=attack.seed, eot=attack.eot)
    else:
        endless = ATTACKS["bim"](widest, steps=20, norm=attack.norm, adjoint=attack.adjoint, seed=attack.seed, eot=attack.eot)
    found["unbounded"] = endless, rest
    if not any(other.access in ("scores", "decisions") and threat_of(other) == threat_of(attack) for other in attacks.values()):
        found["gradient-free"] = ATTACKS["square"](attack.eps, norm=attack.norm, budget=QUERIES, seed=attack.seed), rest
    return found


def main_attack(attacks: Mapping[str, Attack], results: Mapping[str, Result]) -> str | None:
    """The first iterative attack with gradients (PGD where there is one, on every sample where there is one), at its most telling size:
    the largest that leaves a tenth of the samples, else the smallest."""
    able = [name for name, attack in attacks.items() if attack.access == "gradient" and not attack.single_step and attack.name != "ensemble"]
    able = [name for name in able if 0 < attacks[name].radius < math.inf and hasattr(attacks[name], "steps")]
    if not able:
        return None
    first = min(able, key=lambda name: (results[name].skips, attacks[name].name != "pgd"))

    def kind(name: str) -> tuple:
        return attacks[name].name, attacks[name].norm, attacks[name].steps, results[name].skips

    same = sorted((name for name in able if kind(name) == kind(first)), key=lambda name: attacks[name].eps)
    return next((name for name in reversed(same) if results[name].accuracy >= TELLING), same[0])


def threat_of(attack: Attack) -> tuple[str, float]:
    return attack.norm, attack.radius


def chosen(count: int, limit: int) -> list[int]:
    """The same `limit` places out of `count` each time, spread at random over all."""
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit].tolist())


def _changed(attack: Attack, eps: float | None = None, steps: int | None = None) -> Attack:
    """The same attack at another size, its steps in proportion, or with another number of steps of the same size."""
    other = copy.copy(attack)
    other.eps, other.steps = eps or attack.eps, steps or attack.steps
    if isinstance(getattr(attack, "step_size", None), float):
        other.step_size = attack.step_size * (other.eps / attack.eps)
    return other


def _steps_more(many: Attack, one: Attack) -> bool:
    """Whether two attacks differ in that the first takes many steps where the second takes one."""
    alike = threat_of(many) == threat_of(one) and (many.name == "ensemble" or one.name != "ensemble")
    return alike and many.radius < math.inf and many.access == one.access == "gradient" and one.single_step and not many.single_step


def _is_larger(large: Attack, small: Attack) -> bool:
    """Whether two attacks differ in their size alone, and the first is larger."""
    if large.name != small.name or large.norm != small.norm or not large.eps > small.eps > 0:
        return False
    first, second = ({key: value for key, value in attack.options().items() if key not in ("eps", "step_size")} for attack in (large, small))
    return first == second


# ---- verdicts ----------------------------------------------------------------------------------------------------------------


def verdicts(
    model: nn.Module,
    images: Tensor,
    attacks: Mapping[str, Attack],
    results: Mapping[str, Result],
    probed: Mapping[str, Mapping[int, bool]],
    limit: int,
    seed: int = 0,
) -> list[Check]:
    """Every check, in the order of CHECKS. images: a batch of clean images. seed: of a random model's numbers."""
    with evaluating(model), torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(seed)
        scores = model(images), model(images)
    evidence = Evidence(scores, attacks, results, main_attack(attacks, results), probed, chosen(len(results["clean"].correct), limit))
    return [Check(name, *check(evidence)) for name, check in CHECKS.items()]


Verdict = tuple[str, str, dict]
OK, SUSPICIOUS, UNTESTED = "ok", "suspicious", "not tested"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def worse(first: Sequence[bool], second: Sequence[bool]) -> bool:
    """Whether the first attack finds less than the second: more samples go one way than the other, beyond chance (sign test, one-sided, 5 %)."""
    missed, gained = sum(a and not b for a, b in zip(first, second)), sum(b and not a for a, b in zip(first, second))
    return missed - gained > 0.005 * len(first) and _tail(missed, missed + gained) < 0.05


def _tail(least: int, count: int) -> float:
    """The chance of at least so many heads in `count` throws of a coin."""
    if count > 1000:
        return 0.5 * math.erfc((least - 0.5 - count / 2) / math.sqrt(count / 2))
    return sum(math.comb(count, heads) for heads in range(least, count + 1)) / 2**count


def _compared(evidence: Evidence, fits, reason: str, words: str, missing: str) -> Verdict:
    """Pairs of attacks of which the first should find at least what the second does."""
    pairs, results = evidence.pairs(fits), evidence.results
    if not pairs:
        return UNTESTED, missing, {}
    bad = [pair for pair in pairs if worse(results[pair[0]].correct, results[pair[1]].correct)]
    figures = {f"{a} / {b}": [results[a].accuracy, results[b].accuracy] for a, b in (bad or pairs)}
    if bad:
        told = "; ".join(f"{a} finds less than {b} ({_percent(results[a].accuracy)} are left, not {_percent(results[b].accuracy)})" for a, b in bad)
        return SUSPICIOUS, f"{told}: {reason}", figures
    return OK, f"{words} in {len(pairs)} pair{'s' * (len(pairs) > 1)} of attacks", figures


def _gained(evidence: Evidence, name: str, what: str, meaning: str) -> Verdict:
    """A probe on samples that every row leaves: what it finds in addition, as a share of all images of the checks."""
    if name not in evidence.probed:
        return UNTESTED, _unprobed(evidence), {}
    total, tried = len(evidence.places), len(evidence.probed[name])
    new = tried - sum(evidence.probed[name].values())
    low, high = wilson(new, total)
    figures = {"fooled": new, "tried": tried, "images": total, "interval": [low, high], "attack": evidence.main}
    text = f"{what} fools {new} of {total} images that no row has fooled ({_percent(new / total)})"
    return (SUSPICIOUS, f"{text}: {meaning}", figures) if low > LITTLE else (OK, text, figures)


def _unprobed(evidence: Evidence) -> str:
    if evidence.main is None:
        return "no iterative attack with gradients is among the attacks"
    return "it needs attacks of its own: ask for images to check on (check_images, --check-images)"


def harmful(evidence: Evidence) -> Verdict:
    clean = evidence.results["clean"]
    attacked = [name for name, attack in evidence.attacks.items() if not evidence.results[name].skips and attack.access != "nothing"]
    if not attacked:
        return UNTESTED, "no attack was run on every sample", {}
    bad = [name for name in attacked if worse(evidence.results[name].correct, clean.correct)]
    figures = {name: evidence.results[name].accuracy for name in (bad or attacked)}
    if bad:
        return SUSPICIOUS, "; ".join(f"{name} is less harmful than no attack at all" for name in bad), figures
    return OK, "no attack leaves more than no attack does", figures


def _against_probe(evidence: Evidence, probe: str, told: str, reason: str) -> Verdict:
    """The main attack against a probe that should find less, on the images of the checks."""
    weaker = evidence.probed.get(probe)
    if weaker is None:
        return UNTESTED, _unprobed(evidence), {}
    first, second = [evidence.results[evidence.main].correct[place] for place in weaker], list(weaker.values())
    shares = sum(first) / len(first), sum(second) / len(second)
    text = f"{evidence.main} leaves {_percent(shares[0])} of {len(first)} images, {told} {_percent(shares[1])}"
    figures = {"images": len(first), "accuracy": shares[0], "accuracy of the weaker": shares[1], "attack": evidence.main}
    return (SUSPICIOUS, f"{text}: {reason}", figures) if worse(first, second) else (OK, text, figures)


def iterative(evidence: Evidence) -> Verdict:
    reason = "many steps should find at least as much as one"
    found = _compared(evidence, _steps_more, reason, "many steps find at least as much as one", "")
    return found if found[0] != UNTESTED else _against_probe(evidence, "iterative", "one step", reason)


def white_box(evidence: Evidence) -> Verdict:
    def fits(white: Attack, black: Attack) -> bool:
        return white.access == "gradient" and not white.single_step and black.access in ("transfer", "scores", "decisions") and threat_of(white) == threat_of(black)

    missing = "no attack that knows less of the model was run on every sample: name another run (--transfer-from)"
    words = "attacks with the model's gradient find at least as much as those without"
    return _compared(evidence, fits, "an attack that knows the model should find at least as much", words, missing)


def larger_eps(evidence: Evidence) -> Verdict:
    reason = "a larger eps should find at least as much"
    found = _compared(evidence, _is_larger, reason, "a larger eps finds at least as much", "")
    return found if found[0] != UNTESTED else _against_probe(evidence, "larger-eps", "at half the size", reason)


def unbounded(evidence: Evidence) -> Verdict:
    if "unbounded" not in evidence.probed:
        return UNTESTED, _unprobed(evidence), {}
    total, left = len(evidence.places), sum(evidence.probed["unbounded"].values())
    low, high = wilson(left, total)
    figures = {"left": left, "images": total, "interval": [low, high]}
    text = f"with no bound on the perturbation {left} of {total} images are left ({_percent(left / total)})"
    if low > NOTHING:
        return SUSPICIOUS, f"{text}: wanted almost none, for such an attack may replace the image; its gradients lead nowhere", figures
    return OK, text, figures


def noise(evidence: Evidence) -> Verdict:
    if "noise" not in evidence.probed:
        return UNTESTED, _unprobed(evidence), {}
    total = len(evidence.probed["noise"])
    if not total:
        return UNTESTED, "the model is right on none of the images to check on", {}
    fooled = total - sum(evidence.probed["noise"].values())
    low, high = wilson(fooled, total)
    eps = size_text(evidence.attacks[evidence.main].eps)
    figures = {"fooled": fooled, "images": total, "interval": [low, high], "eps": evidence.attacks[evidence.main].eps}
    text = f"uniform noise of {eps} fools {fooled} of {total} images that are classified right ({_percent(fooled / total)})"
    if low > NOISE:
        return SUSPICIOUS, f"{text}: wanted next to none; the model is brittle at this size, and no attack needs to be clever", figures
    return OK, text, figures


def more_steps(evidence: Evidence) -> Verdict:
    return _gained(evidence, "more-steps", f"{evidence.main} with twice the steps", "the attack has not converged: give it more steps (--steps)")


def more_restarts(evidence: Evidence) -> Verdict:
    if evidence.main and evidence.probed and "more-restarts" not in evidence.probed:
        return UNTESTED, f"{evidence.main} has no random start with a seed", {}
    return _gained(evidence, "more-restarts", f"{evidence.main} from another random start", "one start is not enough: give it more (--restarts)")


def repeatable(evidence: Evidence) -> Verdict:
    first, second = evidence.scores
    if torch.equal(first, second):
        return OK, "two passes over the same images give the same bits", {}
    one = [name for name, attack in evidence.attacks.items() if attack.access == "gradient" and attack.eot == 1]
    text = "The model's outputs are random: its accuracy varies between runs." + (f" {', '.join(one)}: wanted eot > 1." if one else "")
    return SUSPICIOUS, text, {"largest difference": (first - second).abs().max().item()}


def logits(evidence: Evidence) -> Verdict:
    scores = evidence.scores[0].double()
    if scores.min() >= 0 and (scores.sum(1) - 1).abs().max() < 1e-3 and ((scores > 0) & (scores < 1)).any():
        return SUSPICIOUS, "the model returns probabilities: their gradient vanishes where it is sure; take the softmax out of the model", {}
    return OK, "the model returns logits", {"smallest": scores.min().item(), "largest": scores.max().item()}


def gradient_free(evidence: Evidence) -> Verdict:
    """Samples that every attack with gradients leaves, and one without fools."""
    meaning = "attacks with gradients should have found these: they stop too early, or their gradient is masked"
    if "gradient-free" in evidence.probed:
        return _gained(evidence, "gradient-free", f"the square attack with {QUERIES} queries", meaning)
    results, attacks = evidence.results, evidence.attacks
    free = [name for name, attack in attacks.items() if attack.access in ("scores", "decisions") and attack.radius < math.inf]
    if not free:
        return UNTESTED, _unprobed(evidence), {}
    order, told = list(attacks), {}
    for name in free:
        before = [results["clean"]]
        for other in order:
            alike = attacks[other].norm == attacks[name].norm and attacks[other].radius <= attacks[name].radius
            # What skips samples counts as fooling them: rows before it must have left them.
            if alike and (attacks[other].access == "gradient" or (order.index(other) < order.index(name) and results[name].skips)):
                before.append(results[other])
        told[name] = sum(stood and not right for stood, right in zip(all_right(before), results[name].correct))
    total = len(results["clean"].correct)
    bad = [name for name, new in told.items() if wilson(new, total)[0] > LITTLE]
    text = "; ".join(f"{name} fools {told[name]} of {total} samples that no attack with gradients does" for name in (bad or told))
    return (SUSPICIOUS, f"{text}: {meaning}", told) if bad else (OK, text, told)


def inside_ball(evidence: Evidence) -> Verdict:
    shares = {name: evidence.results[name].largest / attack.radius for name, attack in evidence.attacks.items() if 0 < attack.radius < math.inf}
    if not evidence.attacks:
        return UNTESTED, "there are no attacks", {}
    figures = {"largest perturbation, as a share of eps": max(shares.values())} if shares else {}
    return OK, "every final image was measured: no perturbation is larger than its attack allows, and every pixel is in range", figures


def zero_gradient(evidence: Evidence) -> Verdict:
    shares = {name: evidence.results[name].zero_gradient for name in evidence.attacks}
    shares = {name: share for name, share in shares.items() if share is not None}
    if not shares:
        return UNTESTED, "no attack took a gradient", {}
    bad = {name: share for name, share in shares.items() if share > 0.01}
    if bad:
        most = max(bad, key=bad.__getitem__)
        more = f" (and {len(bad) - 1} more attacks)" if len(bad) > 1 else ""
        return SUSPICIOUS, f"{most}{more}: the gradient is zero for {bad[most]:.1%} of the samples; an attack without gradients may find more", bad
    return OK, f"the first gradient is zero for at most {max(shares.values()):.1%} of the samples", shares


def plain_gradient(evidence: Evidence) -> Verdict:
    """The attack through the surrogate of training against the worst case at its size."""
    if evidence.main is None:
        return UNTESTED, _unprobed(evidence), {}
    attack, plain = evidence.attacks[evidence.main], evidence.results[evidence.main]
    rows = [name for name, other in evidence.attacks.items() if other.norm == attack.norm and other.radius <= attack.radius and name != evidence.main]
    if all(evidence.attacks[name].name in ("fgsm", "pgd", "uniform") for name in rows):
        return UNTESTED, "no stronger attack was run: --suite ensemble goes through other gradient approximations", {}
    worst = all_right(within(evidence.results, attack.norm, attack.eps))
    gap, total = sum(plain.correct) - sum(worst), len(worst)
    figures = {"plain": plain.accuracy, "worst": sum(worst) / total, "interval": list(wilson(gap, total))}
    text = f"{evidence.main} leaves {_percent(plain.accuracy)}, the worst case at its size {_percent(sum(worst) / total)}"
    if wilson(gap, total)[0] > MASKED:
        return SUSPICIOUS, f"{text}: the plain attack is too weak here, or its gradient is masked; quote the worst case", figures
    return OK, text, figures


#: Every check by its name.
CHECKS: dict[str, Callable[[Evidence], Verdict]] = {
    "harmful": harmful,
    "iterative": iterative,
    "white-box": white_box,
    "larger-eps": larger_eps,
    "unbounded": unbounded,
    "noise": noise,
    "more-steps": more_steps,
    "more-restarts": more_restarts,
    "repeatable": repeatable,
    "logits": logits,
    "gradient-free": gradient_free,
    "inside-ball": inside_ball,
    "zero-gradient": zero_gradient,
    "plain-gradient": plain_gradient,
}
