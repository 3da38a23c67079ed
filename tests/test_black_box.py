"""Attacks that look for a small perturbation, and those that take no gradient: CW, FAB, Square, RayS."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from attack_cases import X, Y, draw, margin
from cases import assert_same_bits
from fastsnn import NoisyLIF
from fastsnn.attacks import ATTACKS, CW, FAB, RayS, Square, Streams, make_attack
from fastsnn.attacks.base import crafting
from fastsnn.attacks.fab import onto_plane
from fastsnn.attacks.square import bumps
from torch import Tensor, nn
from torchattacks.attacks.fab import projection_l2, projection_linf
from trained import NETWORKS, digits, network

NORMED = [(name, norm) for name in ("cw", "fab", "square", "rays") for norm in ATTACKS[name].norms]
every_normed = pytest.mark.parametrize("name, norm", NORMED)
#: What keeps an attack cheap on the models of this file.
CHEAP = {"cw": {"steps": 60, "lr": 0.02, "searches": 2}, "fab": {"steps": 8}, "square": {"budget": 60}, "rays": {"budget": 60}}
#: What lets some samples of them leave early, in little time.
FEW = {"cw": {"steps": 10}, "fab": {"steps": 2, "restarts": 2}, "square": {"budget": 12, "restarts": 2}, "rays": {"budget": 40}}
EPS = {"linf": 0.1, "l2": 0.7}


def attack_of(name: str, norm: str, **options):
    return make_attack(name, **{"eps": EPS[norm], "norm": norm, "seed": 0, **CHEAP[name], **options})


class Linear(nn.Module):
    """Distances to its boundaries have a closed form, as long as no pixel reaches the end of its range."""

    def __init__(self, pixels: int = 48, classes: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(classes, pixels, seed=1).double() - 0.5)

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1).to(self.weight.dtype) - 0.5) @ self.weight.T

    def distance(self, images: Tensor, labels: Tensor, norm: str) -> Tensor:
        """[N] to the nearest boundary: `|z_i - z_y| / |w_i - w_y|_q`, q = 1 for linf and 2 for l2."""
        logits = self(images)
        gaps = logits.gather(1, labels[:, None]) - logits
        sizes = (self.weight[None] - self.weight[labels][:, None]).norm(dim=2, p=1 if norm == "linf" else 2)
        return torch.where(sizes > 0, gaps / sizes.clamp(min=1e-12), math.inf).amin(1).detach()


def inner_images(model: Linear, count: int = 40) -> Tensor:
    """Images far from the ends of the range, and neither close to a boundary nor far from it."""
    x = 0.3 + 0.4 * draw(1000, 3, 4, 4, seed=2).double()
    distance = model.distance(x, model(x).argmax(1), "linf")
    return x[(distance > 0.015) & (distance < 0.05)][:count]


LINEAR = Linear()
INNER = inner_images(LINEAR)
ANSWERS = LINEAR(INNER).argmax(1)


class Products(nn.Module):
    """Logits without a sum over pixels: no rounding that depends on the batch."""

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.flatten(1)
        return (pixels[:, :4] - 0.5) * 3 * pixels[:, 4:8]


PIXELS = Products()
PIXEL_ANSWERS = PIXELS(INNER).argmax(1)


def moved(found: Tensor, clean: Tensor, norm: str) -> Tensor:
    return (found - clean).flatten(1).norm(dim=1, p=math.inf if norm == "linf" else 2)


# ---- against torchattacks ----------------------------------------------------------------------------------------------


def theirs(name: str, norm: str, model: nn.Module):
    """The same attack of torchattacks with the same budget, at a size that fools some."""
    if name == "cw":
        return CW(c=2.0, steps=12, lr=0.03), torchattacks.CW(model, c=2.0, steps=12, lr=0.03)
    if name == "fab":
        eps = {"linf": 0.14, "l2": 0.8}[norm]
        return FAB(eps, steps=2, norm=norm), torchattacks.FAB(model, norm=norm.capitalize(), eps=eps, steps=2, multi_targeted=True, n_classes=10)
    eps, budget = {"linf": (0.08, 40), "l2": (0.7, 80)}[norm]
    return Square(eps, budget=budget, norm=norm, seed=0), torchattacks.Square(model, norm=norm.capitalize(), eps=eps, n_queries=budget - 1)


@pytest.mark.parametrize("name, norm", [("cw", "l2"), ("fab", "linf"), ("fab", "l2"), ("square", "linf"), ("square", "l2")])
@pytest.mark.parametrize("trained", NETWORKS)
def test_no_weaker_than_torchattacks(name, norm, trained):
    model, (x, y) = network(trained), digits(500)
    own, other = theirs(name, norm, model)
    with crafting(model), torch.random.fork_rng():  # frozen parameters spare the other a backward pass through the weights
        torch.manual_seed(0)
        theirs_left = float((model(other(x, y)).argmax(1) == y).double().mean())
    found = own(model, x, y)
    left, clean = (float((model(images).argmax(1) == y).double().mean()) for images in (found, x))
    assert left <= theirs_left + 0.01 and left < clean - 0.03


@pytest.mark.parametrize("norm, projection", [("linf", projection_linf), ("l2", projection_l2)])
def test_planes_against_torchattacks(norm, projection):
    """The projection onto a plane within the range of pixels, also where the range cuts it off."""
    points, normals = draw(300, 40, seed=3).double(), torch.randn(300, 40, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    points[:, :4], points[:, 4:8], normals[:, 8:12] = 0, 1, 0
    gap = torch.randn(300, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 8
    want = projection(points.clone(), normals.clone(), (normals * points).sum(1) + gap)
    found = onto_plane(points, normals, gap, norm)
    torch.testing.assert_close(found, want, rtol=0, atol=2e-6)  # their steps through float32 constants
    reached = (normals * found).sum(1)
    room = torch.where(normals * gap[:, None] > 0, 1 - points, points)
    reachable = (normals.abs() * room).sum(1) >= gap.abs()
    assert 200 < reachable.sum() < 300 and (found + points).clamp(0, 1).sub(found + points).abs().max() < 1e-12
    torch.testing.assert_close(reached[reachable], gap[reachable], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[~reachable].abs(), (room * (normals != 0))[~reachable])


# ---- what all of them keep to ------------------------------------------------------------------------------------------


@every_normed
def test_small_perturbations_of_a_linear_model(name, norm):
    """Most of what can be fooled is; nothing is that is farther from the boundary than eps."""
    distance, slack = LINEAR.distance(INNER, ANSWERS, norm), {"cw": 1.2, "fab": 1.02, "rays": 1.5, "square": 2 if norm == "l2" else 1.5}[name]
    eps = float(distance.quantile(0.95))
    found = attack_of(name, norm, eps=eps, **({"budget": 200} if name in ("square", "rays") else {}))(LINEAR, INNER, ANSWERS)
    fooled = LINEAR(found).argmax(1) != ANSWERS
    assert (distance > eps).any() and not fooled[distance > eps].any()
    easy = distance < eps / slack
    assert easy.sum() >= 5 and fooled[easy].double().mean() > 0.8


@pytest.mark.parametrize("name, norm, excess", [("fab", "linf", 1.01), ("fab", "l2", 1.01), ("cw", "l2", 1.02), ("cw", "linf", 1.2), ("rays", "linf", 1.05)])
def test_without_eps_the_nearest_image_is_found(name, norm, excess):
    distance = LINEAR.distance(INNER, ANSWERS, norm)
    options = {"fab": {"steps": 10}, "cw": {"steps": 60, "searches": 2, "lr": 0.02}, "rays": {"budget": 500, "tolerance": 1e-4}}[name]
    attack = make_attack(name, norm=norm, **options)
    assert attack.eps == math.inf
    found = attack(LINEAR, INNER, ANSWERS)
    assert (LINEAR(found).argmax(1) != ANSWERS).all()
    ratio = moved(found, INNER, norm) / distance
    assert ratio.min() >= 1 - 1e-9 and ratio.median() < excess and ratio.max() < 2  # some are caught at the boundary of another class


@every_normed
def test_targets_are_reached(name, norm):
    target = LINEAR(INNER).topk(2).indices[:, 1]
    found = attack_of(name, norm, targeted=True, eps=0.2 if norm == "linf" else 1.5, **({"budget": 200} if name == "rays" else {}))(LINEAR, INNER, target)
    assert (LINEAR(found).argmax(1) == target).double().mean() > {"rays": 0.7}.get(name, 0.95)


@every_normed
def test_a_sample_does_not_depend_on_its_batch(name, norm):
    """In both norms, where some leave early: by seed, place in the data set, and nothing else."""
    attack, places = attack_of(name, norm, eps=EPS[norm] / (10 if name != "rays" else 3), **FEW[name]), torch.arange(len(INNER))
    together = attack(PIXELS, INNER, PIXEL_ANSWERS, places)
    queries = attack.queries
    assert 1 < len(queries.unique())
    for part in (slice(0, 1), slice(1, 14), slice(14, 40)):
        alone = attack(PIXELS, INNER[part], PIXEL_ANSWERS[part], places[part])
        assert_same_bits("images", alone, together[part])
        assert torch.equal(attack.queries, queries[part])


@every_normed
def test_wrong_already(name, norm):
    """An image that is wrong comes back as it was, after one query; the others do not notice."""
    wrong = (ANSWERS + 1) % 4
    labels = torch.where(torch.arange(40) % 3 > 0, ANSWERS, wrong)
    attack = attack_of(name, norm)
    found = attack(LINEAR, INNER, labels)
    assert_same_bits("images", found[::3], INNER[::3])
    assert (attack.queries[::3] == 1).all() and (attack.queries[1::3] > 1).all() and (found[1::3] != INNER[1::3]).flatten(1).any(1).all()


@pytest.mark.parametrize("name, norm", [("square", "linf"), ("square", "l2"), ("rays", "linf")])
def test_budgets(name, norm):
    """A sample that stands has asked as often as it may, and once more on its clean image."""
    attack = attack_of(name, norm, eps=1e-3, budget=23)
    attack(LINEAR, INNER, ANSWERS)
    standing = LINEAR.distance(INNER, ANSWERS, norm) > 1e-3
    assert standing.sum() > 30 and (attack.queries[standing] == 24).all()


def test_decisions_are_enough():
    """RayS on classes alone finds the same images bit for bit; Square does with scores that carry no gradient."""

    class Decisions(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return F.one_hot(LINEAR(images).argmax(1), 4).double()

    class Detached(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return LINEAR(images).detach()

    for name, model in (("rays", Decisions()), ("square", Detached())):
        attack = attack_of(name, "linf", eps=0.05)
        found = attack(model, INNER, ANSWERS)
        assert_same_bits(name, found, attack(LINEAR, INNER, ANSWERS))
        assert (LINEAR(found).argmax(1) != ANSWERS).any() and attack.zero_gradient is None


@pytest.mark.parametrize("name", ["fab", "square"])
def test_restarts_never_lose(name):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 30), nn.ReLU(), nn.Linear(30, 4)).double()
    answers = model(INNER).argmax(1)
    options = {"fab": {"steps": 1, "target_classes": 2}, "square": {"budget": 25}}[name]
    eps = {"fab": 0.015, "square": 0.05}[name]
    once, thrice = (attack_of(name, "linf", eps=eps, **{**options, "restarts": count})(model, INNER, answers) for count in (1, 3))
    fooled, again = (model(found).argmax(1) != answers for found in (once, thrice))
    assert (again | ~fooled).all() and (thrice != once).any()
    assert_same_bits("what is fooled at once", thrice[fooled], once[fooled])


@pytest.mark.parametrize("name, norm", [("square", "linf"), ("square", "l2"), ("rays", "linf"), ("fab", "l2"), ("cw", "linf")])
@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 3, 4, 2)], ids=str)
def test_images_of_any_shape(name, norm, shape):
    x = 0.4 + draw(5, *shape, seed=3).double() / 5
    model = Linear(math.prod(shape))
    found = attack_of(name, norm, eps=EPS[norm])(model, x, model(x).argmax(1))
    assert found.shape == x.shape and (found != x).flatten(1).any(1).all()


def test_the_answer_of_a_random_model_is_a_mean():
    """Of as many passes as gradients are averaged: a single one may be fooled by chance."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 20), NoisyLIF(1.0), nn.Linear(20, 4))
    passes = []

    class Steps(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            passes.append(len(images))
            return model(images)

    for name in ("square", "rays"):
        passes.clear()
        attack = attack_of(name, "linf", eot=5, budget=7)
        attack(Steps(), X, torch.stack([model(X) for _ in range(100)]).mean(0).argmax(1))
        assert len(passes) % 5 == 0 and (attack.queries % 5 == 0).all() and passes[:5] == [6] * 5 and passes[5] < 6


# ---- exact forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm, targeted, kappa", [("l2", False, 0), ("l2", True, 0), ("linf", False, 0), ("linf", True, 0), ("l2", False, 200)])
def test_cw_is_adam_on_w(norm, targeted, kappa):
    """The images asked about, against torch.optim.Adam on the published objective: models that are never fooled, and one that is
    always, but not by kappa."""
    x, asked = INNER[:6], []
    labels = torch.where(torch.tensor(targeted), (ANSWERS + 1) % 4, ANSWERS)[:6]
    answer = (ANSWERS[:6] + (kappa > 0)) % 4

    class Firm(nn.Module):
        """Far on the side of one answer, with the slopes of LINEAR."""

        def forward(self, images: Tensor) -> Tensor:
            asked.append(images.detach().clone())
            return LINEAR(images) + 50 * F.one_hot(answer, 4)

    CW(c=0.3, steps=5, lr=0.05, kappa=kappa, norm=norm, targeted=targeted)(Firm(), x, labels)
    own, asked = asked, []
    w = torch.atanh(2 * x - 1).requires_grad_()
    optimizer = torch.optim.Adam([w], lr=0.05)
    model = Firm()
    for step in range(6):
        image = (w.tanh() + 1) / 2
        torch.testing.assert_close(own[step], image.detach(), rtol=0, atol=1e-12)
        gap = margin(model(image), labels) * (-1 if targeted else 1)
        away = (image - x).square().sum() if norm == "l2" else ((image - x).abs() - 1).clamp(min=0).sum()
        optimizer.zero_grad()
        (away - 0.3 * gap.sum()).backward()
        optimizer.step()
    assert len(own) == 6 and (own[5] - x).abs().max() > 0.05


def test_cw_moves_pixels_at_the_ends():
    """tanh is flat at 0 and 1, where many pixels are; they leave the ends, and return what is not needed."""
    x = torch.where(draw(40, 3, 4, 4, seed=6) < 0.5, 0.0, 1.0).double()
    labels = LINEAR(x).argmax(1)
    found = CW(c=10.0, steps=100)(LINEAR, x, labels)
    assert (LINEAR(found).argmax(1) != labels).double().mean() > 0.9
    still = CW(c=1e-6, steps=20)(LINEAR, x, labels)
    assert (still - x).abs().max() < 0.01


def test_cw_searches_for_c_and_keeps_the_confidence():
    weak = {"c": 1e-3, "steps": 40, "lr": 0.02}
    assert (LINEAR(CW(**weak)(LINEAR, INNER, ANSWERS)).argmax(1) == ANSWERS).all()
    found = CW(**weak, searches=5, kappa=0.1)(LINEAR, INNER, ANSWERS)
    assert (margin(LINEAR(found), ANSWERS) >= 0.1 - 1e-12).all() and (margin(LINEAR(found), ANSWERS) < 0.3).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_steps(norm):
    """The images judged, against the update written out, on a model whose margin is a plane: only projections are taken over."""
    asked = []

    class Two(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            asked.append(images.detach().clone())
            return LINEAR(images)[:, :2]

    x, size = INNER[:1], lambda d: d.flatten(1).norm(p=math.inf if norm == "linf" else 2)
    y = Two()(x).argmax(1)
    asked.clear()
    FAB(steps=3, norm=norm, alpha_max=0.02)(Two(), x, y)
    normal = (LINEAR.weight[1 - y] - LINEAR.weight[y]).detach().reshape(x.shape)
    point, judged = x, []
    for _ in range(3):
        near, far = (onto_plane(p, normal, -(normal * (p - 0.5)).sum()[None], norm) for p in (point, x))
        share = min(float(size(near) / (size(near) + size(far))), 0.02)
        point = (1 - share) * (point + 1.05 * near) + share * (x + 1.05 * far)
        judged.append(point)
        if (normal * (point - 0.5)).sum() > 0:
            point = x + 0.9 * (point - x)
    assert len(asked) == 7
    for own, want in zip(asked[2::2], judged):
        torch.testing.assert_close(own, want, rtol=0, atol=1e-8)


def test_square_sides():
    """The schedule of the paper: p halved after 10, 50, ... of 10,000 queries; in l2 odd and at least 3."""
    images = torch.zeros(1, 3, 32, 32)
    full, half = Square(EPS["linf"], budget=10000), Square(EPS["linf"], budget=5000)
    want = {0: 0.8, 10: 0.8, 11: 0.4, 50: 0.4, 51: 0.2, 201: 0.1, 501: 0.05, 1001: 0.025, 2001: 0.0125, 4001: 0.00625, 6001: 0.003125, 8001: 0.0015625}
    for query, share in want.items():
        side = max(round(math.sqrt(share * 1024)), 1)
        assert full.side(query, images) == (side, side) and half.side(query // 2 + query % 2, images) == (side, side)
    sides = [Square(1.0, norm="l2").side(query, images)[0] for query in range(5000)]
    assert all(side % 2 == 1 and side >= 3 for side in sides) and sides == sorted(sides, reverse=True) and sides[-1] == 3
    assert Square(0.1).side(0, torch.zeros(1, 1, 2, 40)) == (2, 8)


def test_square_changes_one_square_to_the_edge_of_the_ball():
    attack, streams = Square(0.1), Streams(3, torch.arange(200))
    clean = draw(200, 3, 9, 9, seed=7)
    x = attack._start(clean, streams)
    assert_same_bits("stripes", x, torch.where(x[:, :, :1] > clean[:, :, :1], clean + 0.1, clean - 0.1).clamp(0, 1))
    corners = set()
    for side in (5, 2, 1):
        new = attack._proposal(x, clean, (side, side), streams)
        changed = (new != x).any(1)
        assert changed.flatten(1).any(1).all(), "a query is lost"
        for image in range(200):
            rows, columns = changed[image].any(1).nonzero()[:, 0], changed[image].any(0).nonzero()[:, 0]
            assert rows.max() - rows.min() < side and columns.max() - columns.min() < side
            corners.update([(int(rows.min()), int(columns.min())), (int(rows.max()), int(columns.max()))])
        edges = ((new == (clean + 0.1).clamp(0, 1)) | (new == (clean - 0.1).clamp(0, 1)))
        assert edges.all()
        x = new
    assert {row for row, _ in corners} == {column for _, column in corners} == set(range(9))


def test_square_in_l2_keeps_the_norm():
    """Mass is moved from one window into another; what the range does not cut off stays on the sphere."""
    attack, streams = Square(0.7, norm="l2"), Streams(3, torch.arange(50))
    clean = 0.4 + draw(50, 3, 12, 12, seed=8).double() / 5
    x = attack._start(clean, streams)
    torch.testing.assert_close(moved(x, clean, "l2"), torch.full((50,), 0.7).double())
    for _ in range(5):
        new = attack._proposal(x, clean, (5, 5), streams)
        torch.testing.assert_close(moved(new, clean, "l2"), torch.full((50,), 0.7).double())
        share = ((new - clean) - (x - clean)).abs().amax(1) > 1e-9
        assert 25 <= share.sum((1, 2)).min() and share.sum((1, 2)).max() <= 50
        x = new


def test_bumps():
    """Equation 2 of the paper, pixel by pixel."""
    for high, wide in ((7, 7), (3, 3), (5, 9), (1, 1), (2, 4)):
        want = torch.zeros(high, wide, dtype=torch.float64)
        for sign, first, rows in ((1, 0, high // 2), (-1, high // 2, high - high // 2)):
            part = torch.zeros(rows, wide, dtype=torch.float64)
            for row in range(rows):
                for column in range(wide):
                    start = max(abs(row - rows // 2), abs(column - wide // 2))
                    part[row, column] = sum(1 / (k + 1) ** 2 for k in range(start, max(rows, wide) // 2 + 1))
            if rows:
                want[first : first + rows] = sign * part / part.norm()
        torch.testing.assert_close(bumps(high, wide, torch.zeros(1, dtype=torch.float64)), want / want.norm())


def test_rays_follows_signs_and_bisects():
    """On one plane in four pixels: the directions tried in the paper's order, and the nearest image at the end."""
    weight, asked = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64), []

    class Plane(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            asked.append(images - 0.5)
            score = (images - 0.5) @ weight - 0.4
            return torch.stack([-score, score], 1)

    x = torch.full((1, 4), 0.5, dtype=torch.float64)
    found = RayS(budget=60, tolerance=1e-6)(Plane(), x, torch.tensor([0]))
    signs = []
    for delta in torch.cat(asked[1:]):
        if not signs or delta.sign().tolist() != signs[-1]:
            signs.append(delta.sign().tolist())
    # All and none point along the plane; the first half turned the wrong way, the second half turned is the answer.
    assert signs[:4] == [[1, 1, 1, 1], [-1, -1, -1, -1], [-1, -1, 1, 1], [1, 1, -1, -1]]
    torch.testing.assert_close(found - x, weight[None] * 0.1, rtol=0, atol=1e-6)


BAD_OPTIONS = {
    "budget of Square": (lambda: Square(0.1, budget=0), "Square: budget is 0"),
    "p": (lambda: Square(0.1, p=0), "p is 0; wanted the share"),
    "eps of Square": (lambda: Square(math.inf), "Square: eps is inf"),
    "budget of RayS": (lambda: RayS(0.1, budget=1.5), "RayS: budget is 1.5"),
    "tolerance": (lambda: RayS(0.1, tolerance=0), "tolerance is 0"),
    "norm of RayS": (lambda: RayS(0.1, norm="l2"), "keeps to linf"),
    "loss of FAB": (lambda: FAB(0.1, loss="ce"), "FAB: loss is 'ce'.*defined by the margin"),
    "loss of CW": (lambda: CW(loss="ce"), "CW: loss is 'ce'"),
    "eta": (lambda: FAB(0.1, eta=0.9), "eta 0.9"),
    "target_classes": (lambda: FAB(0.1, target_classes=0), "target_classes is 0"),
    "c": (lambda: CW(c=0), "c is 0"),
    "kappa": (lambda: CW(kappa=-1), "kappa -1"),
    "searches": (lambda: CW(searches=0), "searches is 0"),
}


@pytest.mark.parametrize("what", BAD_OPTIONS)
def test_bad_options(what):
    call, words = BAD_OPTIONS[what]
    with pytest.raises(ValueError, match=words):
        call()
