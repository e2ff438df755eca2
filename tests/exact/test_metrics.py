"""Metrics where the answer is known: closed forms, invariances, unbiasedness, standard errors."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor, nn

from fewstep.metrics import (
    GaussianKernel,
    ModuleFeatures,
    Pixels,
    PolynomialKernel,
    accuracy,
    bootstrap,
    density_coverage,
    diversity,
    energy_distance,
    energy_distance_unbiased,
    frechet_distance,
    gaussian_frechet_distance,
    jackknife,
    kernel_distance,
    kernel_estimate,
    load_features,
    measure,
    median_distance,
    memorisation,
    nearest_distances,
    precision_recall,
    principal_directions,
    real_against_real,
    sliced_wasserstein,
    wasserstein_1d,
)
from fewstep.metrics.cost import _peak_cuda
from fewstep.metrics.features import imagenet_input
from fewstep.randomness import Rng


def draw(seed: int, n: int, d: int) -> Tensor:
    return Rng(seed, "test metrics").normal(n, d, dtype=torch.float64)


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(draw(99, d, d)).Q


def within_errors(values: list[float], truth: float, errors: float = 4.0) -> bool:
    """Whether the mean of independent values lies within so many standard errors of the truth."""
    v = torch.tensor(values, dtype=torch.float64)
    return abs(float(v.mean()) - truth) <= errors * float(v.std()) / math.sqrt(len(v))


# --- Fréchet distance ---------------------------------------------------------------------------------------------


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    """Covariances with common eigenvectors: |m - m'|^2 + sum (s_i - s_i')^2."""
    q = rotation(5)
    s, s_r = torch.tensor([3.0, 1.0, 0.5, 0.0, 2.0]).double(), torch.tensor([1.0, 1.0, 0.1, 0.7, 0.0]).double()
    mean, mean_r = draw(1, 1, 5)[0], draw(2, 1, 5)[0]
    found = gaussian_frechet_distance(mean, (q * s**2) @ q.T, mean_r, (q * s_r**2) @ q.T)
    expected = float((mean - mean_r).square().sum() + (s - s_r).square().sum())
    # Null directions leave 1e-8 of the largest deviation in a symmetric root.
    assert found == pytest.approx(expected, rel=1e-7)


def test_frechet_of_two_by_two_gaussians_is_the_closed_form():
    """Covariances that do not commute: tr (S S')^(1/2) = sqrt(tr S S' + 2 sqrt(det S S')) in two dimensions."""
    a, b = draw(3, 2, 2), draw(4, 2, 2)
    s, s_r = a @ a.T, b @ b.T
    product = s @ s_r
    root = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    zero = torch.zeros(2)
    expected = float(s.trace() + s_r.trace() - 2 * root)
    assert gaussian_frechet_distance(zero, s, zero, s_r) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "m", "d"), [(50, 70, 6), (5, 70, 12), (4, 3, 12)])
def test_frechet_of_samples_is_that_of_their_moments(n: int, m: int, d: int):
    """The QR route equals the covariance route, with fewer samples than dimensions too."""
    x, y = draw(5, n, d) + 1, draw(6, m, d) @ rotation(d).tril()
    by_moments = gaussian_frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert frechet_distance(x, y) == pytest.approx(by_moments, rel=1e-6)


def test_frechet_of_moved_and_stretched_samples():
    """A translation costs its squared length, a stretch by c about the mean (c - 1)^2 times the total variance."""
    x = draw(7, 40, 5)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0]).double()
    assert frechet_distance(x + shift, x) == pytest.approx(float(shift.square().sum()), rel=1e-12)
    stretched = x.mean(0) + 3 * (x - x.mean(0))
    assert frechet_distance(stretched, x) == pytest.approx(4 * float(x.var(0).sum()), rel=1e-12)


def test_frechet_keeps_its_digits_with_constant_features():
    """Constant pixels and a rank of 3 in 20 dimensions leave the distance of equal sets at rounding error."""
    x = torch.cat([draw(8, 100, 3) @ draw(9, 3, 10), torch.full((100, 10), 0.7).double()], dim=1)
    assert frechet_distance(x, x.flip(0)) < 1e-13 * float(x.var(0).sum())


def test_frechet_is_symmetric_and_invariant():
    """Under exchange of the sets, any order of the rows, and a common rotation."""
    x, y = draw(10, 60, 4), 2 * draw(11, 80, 4) + 1
    value = frechet_distance(x, y)
    assert frechet_distance(y, x) == pytest.approx(value, rel=1e-12)
    assert frechet_distance(x[Rng(0).shuffled(60)], y[Rng(1).shuffled(80)]) == pytest.approx(value, rel=1e-12)
    assert frechet_distance(x @ rotation(4), y @ rotation(4)) == pytest.approx(value, rel=1e-12)


def test_projection_keeps_the_largest_directions_of_the_reference():
    """With known axes, the projected distance is that of the coordinates with the largest variance."""
    scale = torch.tensor([0.1, 5.0, 0.2, 3.0]).double()
    y = draw(12, 4000, 4)
    y = (y - y.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(y.T.cov())).T * scale  # exactly diagonal covariance
    x = draw(13, 500, 4) + torch.tensor([9.0, 1.0, 9.0, 1.0])
    basis = principal_directions(y, 2)
    assert torch.allclose(basis.abs(), torch.eye(4).double()[:, [1, 3]], atol=1e-10)
    expected = frechet_distance(x[:, [1, 3]], y[:, [1, 3]])
    assert frechet_distance(x, y, directions=2) == pytest.approx(expected, rel=1e-9)


# --- kernel distance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [PolynomialKernel(), GaussianKernel(1.3)])
def test_kernel_distance_is_its_double_sum(kernel):
    """The definition, pair by pair, without the diagonal."""
    x, y = draw(20, 7, 3), draw(21, 9, 3) + 0.5

    def k(a: Tensor, b: Tensor) -> float:
        if isinstance(kernel, PolynomialKernel):
            return (float(a @ b) / 3 + 1) ** 3
        return math.exp(-float((a - b).square().sum()) / (2 * 1.3**2))

    def pairs(z: Tensor) -> float:
        n = len(z)
        return sum(k(z[i], z[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    expected = pairs(x) + pairs(y) - 2 * sum(k(a, b) for a in x for b in y) / 63
    assert kernel_distance(x, y, kernel) == pytest.approx(expected, rel=1e-12)


def test_kernel_jackknife_is_the_distance_with_each_sample_left_out():
    """The error from row sums equals the delete-one jackknife done the long way."""
    x, y = draw(22, 15, 3), draw(23, 11, 3) + 0.3
    left_out = torch.tensor(
        [kernel_distance(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(15)], dtype=torch.float64
    )
    expected = float((14 / 15 * (left_out - left_out.mean()).square().sum()).sqrt())
    found = kernel_estimate(x, y)
    assert found.value == pytest.approx(kernel_distance(x, y), rel=1e-12)
    assert found.error == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_made_of_blocks_without_a_seam():
    """More rows than one block holds (1024): the same as with copies of half the size, corrected for the diagonal."""
    x, y = draw(24, 1100, 2), draw(25, 30, 2)
    kernel = GaussianKernel(1.0)
    full = kernel(x, x)
    within = (full.sum() - full.diagonal().sum()) / (1100 * 1099)
    other = kernel(y, y)
    expected = within + (other.sum() - other.diagonal().sum()) / (30 * 29) - 2 * kernel(x, y).mean()
    assert kernel_distance(x, y, kernel) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_gaussian_kernel_distance_is_unbiased(shift: float):
    """Mean over draws = the population value of two Gaussians in closed form, 0 for equal laws, at only 12 samples."""
    d, b2 = 2, 1.5
    same = (b2 / (b2 + 2)) ** (d / 2)
    truth = 2 * same - 2 * same * math.exp(-d * shift**2 / (2 * (b2 + 2)))
    kernel = GaussianKernel(math.sqrt(b2))
    values = [kernel_distance(draw(100 + i, 12, d) + shift, draw(5000 + i, 15, d), kernel) for i in range(800)]
    assert within_errors(values, truth)


def test_cubic_kernel_distance_is_unbiased():
    """Mean over draws of equal laws is 0."""
    values = [kernel_distance(draw(100 + i, 12, 3), draw(5000 + i, 15, 3)) for i in range(800)]
    assert within_errors(values, 0.0)


def test_median_distance():
    """The middle one of the ten distances between 0, 1, 3, 7 and 15 is 6 (the lower one of the middle pair)."""
    assert median_distance(torch.tensor([[0.0], [1.0], [3.0], [7.0], [15.0]])) == 6.0


# --- precision, recall, density, coverage -------------------------------------------------------------------------


def test_manifold_measures_on_a_line():
    """Reference 0, 1, 3, 7 with k = 1 has the radii 1, 1, 2, 4; samples 2, 2.5, 12 lie in 2, 1 and 0 of the balls
    [-1, 1], [0, 2], [1, 5], [3, 11]; the samples' own radii are 0.5, 0.5, 9.5."""
    reference = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    samples = torch.tensor([[2.0], [2.5], [12.0]])
    assert precision_recall(samples, reference, k=1) == (2 / 3, 2 / 4)  # 3 and 7 lie in balls of the samples
    assert density_coverage(samples, reference, k=1) == pytest.approx((3 / 3, 2 / 4))


def test_manifold_measures_of_equal_and_of_distant_sets():
    """1 on identical supports, 0 on disjoint ones; the order of the rows does not matter."""
    x = draw(30, 1100, 3)  # more than one block of rows
    assert precision_recall(x, x.flip(0)) == (1.0, 1.0)
    assert density_coverage(x, x.flip(0))[1] == 1.0
    assert precision_recall(x + 1e3, x) == (0.0, 0.0)
    assert density_coverage(x + 1e3, x) == (0.0, 0.0)


def test_collapse_has_precision_without_recall():
    """One reference picture repeated: every sample is real, and nothing else is covered."""
    x = draw(31, 50, 3)
    samples = x[:1].repeat(50, 1)
    precision, recall = precision_recall(samples, x)
    assert precision == 1.0 and recall == 1 / 50
    assert density_coverage(samples, x)[1] < 0.3


def test_density_and_coverage_of_equal_laws_have_their_expected_values():
    """E density = 1 and E coverage = 1 - prod_i (N - i) / (N + M - i) (Naeem et al. 2020), in any dimension."""
    n, m, k = 30, 40, 3
    pairs = [density_coverage(draw(100 + i, m, 2), draw(5000 + i, n, 2), k) for i in range(500)]
    assert within_errors([density for density, _ in pairs], 1.0)
    missed = math.prod((n - i) / (n + m - i) for i in range(1, k + 1))
    assert within_errors([coverage for _, coverage in pairs], 1 - missed)


# --- energy distance, Wasserstein ---------------------------------------------------------------------------------


def test_energy_distance_by_hand():
    """{0, 2} against {1}: 2 * 1 - 1 - 0; without bias the pair inside counts in full, 2 * 1 - 2 - 0 over {1, 1}."""
    x = torch.tensor([[0.0], [2.0]])
    assert energy_distance(x, torch.tensor([[1.0]])) == 1.0
    assert energy_distance_unbiased(x, torch.tensor([[1.0], [1.0]])) == 0.0
    assert energy_distance(x, x.flip(0)) == 0.0


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_unbiased_energy_distance_has_the_population_value(shift: float):
    """Unit Gaussians at a distance: 2 (E|N(m, 2)| - E|N(0, 2)|) in closed form."""

    def mean_size(m: float) -> float:
        return math.sqrt(4 / math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / 2)

    truth = 2 * (mean_size(shift) - mean_size(0))
    values = [energy_distance_unbiased(draw(100 + i, 10, 1) + shift, draw(5000 + i, 13, 1)) for i in range(800)]
    assert within_errors(values, truth)


def test_wasserstein_on_the_line_is_exact_for_any_counts():
    """Quantile functions 0 | 3 against 0 | 1 | 2 on thirds: by hand; repeating the samples changes nothing."""
    x, y = torch.tensor([[3.0], [0.0]]).double(), torch.tensor([[1.0], [2.0], [0.0]]).double()
    # Sixths: x = 0 0 0 3 3 3, y = 0 0 1 1 2 2.
    assert float(wasserstein_1d(x, y, p=1)) == pytest.approx((0 + 0 + 1 + 2 + 1 + 1) / 6, rel=1e-14)
    assert float(wasserstein_1d(x, y, p=2)) == pytest.approx((0 + 0 + 1 + 4 + 1 + 1) / 6, rel=1e-14)
    assert float(wasserstein_1d(x.repeat(4, 1), y, p=2)) == pytest.approx(7 / 6, rel=1e-14)


def test_wasserstein_of_gaussian_quantiles_is_the_closed_form():
    """W_2^2 of N(0, 1) and N(1, 4) is 1 + 1; stratified quantiles reach it up to the tails they cut."""
    u = (torch.arange(20000).double() + 0.5) / 20000
    z = math.sqrt(2) * torch.erfinv(2 * u - 1)
    assert float(wasserstein_1d(z[:, None], (1 + 2 * z)[:, None])) == pytest.approx(2.0, abs=5e-4)


def test_sliced_wasserstein_in_one_dimension_is_wasserstein():
    """On the line the only directions are +1 and -1."""
    x, y = draw(40, 30, 1), draw(41, 45, 1) + 1
    expected = float(wasserstein_1d(x, y)) ** 0.5
    assert sliced_wasserstein(x, y, Rng(0), slices=3) == pytest.approx(expected, rel=1e-12)


def test_sliced_wasserstein_of_a_translation():
    """Moving all samples by v costs |v|^2 / d on average over the sphere; var = 2 (d - 1) / (d^2 (d + 2)) |v|^4."""
    x, d, slices = draw(42, 20, 4), 4, 4000
    shift = torch.tensor([2.0, 0.0, 0.0, 0.0]).double()
    found = sliced_wasserstein(x + shift, x, Rng(1), slices) ** 2
    deviation = math.sqrt(2 * (d - 1) / (d**2 * (d + 2)) * 16 / slices)
    assert abs(found - 4 / d) < 4 * deviation
    assert sliced_wasserstein(x + shift, x, Rng(1), 8) == sliced_wasserstein(x + shift, x, Rng(1), 8)
    assert sliced_wasserstein(x + shift, x, Rng(1), 8) != sliced_wasserstein(x + shift, x, Rng(2), 8)


# --- classes, memorisation ----------------------------------------------------------------------------------------


def test_accuracy_and_diversity_by_hand():
    """Two of three right; mean distances 2 and 4 within the classes, the lonely class left out."""
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert accuracy(logits, torch.tensor([1, 0, 0])) == pytest.approx(2 / 3)
    points, labels = torch.tensor([[0.0], [2.0], [5.0], [9.0], [70.0]]), torch.tensor([0, 0, 1, 1, 2])
    assert diversity(points, labels) == 3.0
    assert diversity(points[:2]) == 2.0
    assert diversity(points[:1].repeat(6, 1)) == 0.0


def test_nearest_distances_are_exact():
    """Equal to the full distance matrix far from the origin and over several blocks; copies are at 0 exactly."""
    train = draw(50, 5000, 3) + 1e3
    x = torch.cat([draw(51, 2100, 3) + 1e3, train[[4, 4999]]])
    full = torch.cdist(x, train, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    found = nearest_distances(x, train)
    assert torch.allclose(found, full, rtol=1e-5, atol=0) and found[-2:].tolist() == [0.0, 0.0]


def test_memorisation_tells_copies_from_fresh_data():
    """Copies: ratio 0, all close.  Fresh data: ratio about 1, 5 % close.  Half copies: half (and 2.5 %) close."""
    train, held_out, fresh = draw(52, 2000, 5), draw(53, 2000, 5), draw(54, 2000, 5)
    copies = memorisation(train[:1500], train, held_out)
    assert (copies.ratio, copies.close) == (0.0, 1.0)
    new = memorisation(fresh, train, held_out)
    # The sd of a median distance of 2,000 is 1 % of it here, of the share at the 5th percentile 0.7 %.
    assert new.ratio == pytest.approx(1, abs=0.04) and new.close == pytest.approx(0.05, abs=0.02)
    half = memorisation(torch.cat([train[:1000], fresh[:1000]]), train, held_out)
    assert half.close == pytest.approx(0.525, abs=0.015)


# --- standard errors ----------------------------------------------------------------------------------------------


def test_bootstrap_and_jackknife_of_a_mean_have_its_analytic_error():
    """s / sqrt(n): exactly for the delete-one jackknife, within sampling error for bootstrap and delete-a-group."""
    x = draw(60, 400, 1).exp()

    def mean(rows: Tensor) -> float:
        return float(rows.mean())

    analytic = float(x.std()) / 20
    assert jackknife(mean, x, Rng(0), groups=400).error == pytest.approx(analytic, rel=1e-9)
    # An sd from r independent values has a relative error of about 1 / sqrt(2 r).
    assert jackknife(mean, x, Rng(0), groups=100).error == pytest.approx(analytic, rel=4 / math.sqrt(200))
    found = bootstrap(mean, x, Rng(0), repeats=1000)
    assert found.error == pytest.approx(analytic, rel=4 / math.sqrt(2000)) and found.value == mean(x)


def test_jackknife_of_the_frechet_distance_matches_repeated_draws():
    """Away from the floor the mean error over 10 sets equals the spread of the distance over 200 fresh sets."""
    reference = draw(61, 1000, 4)
    sets = [1.3 * draw(200 + i, 300, 4) + 0.5 for i in range(200)]
    spread = float(torch.tensor([frechet_distance(x, reference) for x in sets]).std())
    errors = [jackknife(lambda rows: frechet_distance(rows, reference), x, Rng(0)).error for x in sets[:10]]
    # sd of the spread 5 %, of the mean of ten jackknife errors with 20 groups 5 %.
    assert sum(errors) / 10 == pytest.approx(spread, rel=0.25)


def test_floor_uses_disjoint_sets_of_the_asked_size():
    """103 real rows in sets of 25: four sets, no row twice; too few rows give one value without a spread."""
    seen: list[Tensor] = []

    def first(x: Tensor, y: Tensor) -> float:
        seen.append(x[:, 0])
        return float(len(seen))

    real = torch.arange(103.0)[:, None]
    found = real_against_real(first, real, real, 25, Rng(0))
    assert [len(x) for x in seen] == [25] * 4 and len(torch.cat(seen).unique()) == 100
    assert (found.value, found.error) == (2.5, pytest.approx(math.sqrt(5 / 3)))
    seen.clear()
    assert real_against_real(first, real, real, 500, Rng(0)).error == 0.0 and [len(x) for x in seen] == [103]


# --- features, cost -----------------------------------------------------------------------------------------------


def test_features_go_through_in_batches_in_float64():
    """1,203 samples in batches of 500 keep their order; a module of your own is used as it is."""
    x = torch.arange(1203.0).reshape(1203, 1, 1)
    assert torch.equal(Pixels()(x), x.double().flatten(1))
    doubled = ModuleFeatures("twice", nn.Flatten(), lambda batch: 2 * batch)
    assert torch.equal(doubled(x), 2 * x.double().flatten(1)) and doubled.classify(doubled(x)) is None


def test_pictures_as_imagenet_networks_take_them():
    """One colour everywhere stays so at any size: a level v becomes ``((v + 1) / 2 - mean) / deviation`` of each
    channel, with ImageNet's published moments, and grey is repeated."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for colour in (torch.tensor([[-1.0, 0.2, 1.0]]), torch.tensor([[0.4]])):
        found = imagenet_input(8)(colour[:, :, None, None].expand(-1, -1, 4, 5))
        expected = ((colour + 1) / 2 - mean) / deviation
        assert torch.allclose(found, expected[:, :, None, None].expand(-1, 3, 8, 8), atol=1e-6)


def test_bundled_classifier_head_acts_on_its_features():
    """``classify`` of the features equals the logits of the whole network."""
    features = load_features("digits")
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        logits = features.net(x)
    assert torch.allclose(features.classify(features(x)).float(), logits, rtol=1e-4, atol=1e-4)


class Slow(nn.Module):
    """Doubles its input, with a known temporary, in a known time."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.01)
        wide = x.repeat(1, 3)
        return wide[:, : x.shape[1]] * 2


def test_cost_counts_calls_rows_memory_and_time():
    """Three calls on a doubled batch: 3 calls, 6 rows a sample, the tensors alive at the worst moment, three naps."""
    network = Slow()
    noise = torch.zeros(10, 100)  # 4,000 bytes, held before

    def sample() -> Tensor:
        x = noise[:]  # a view of what was held before costs nothing
        for _ in range(3):
            x = network(torch.cat([x, x]))[:10]
        return x

    cost = measure(sample, network, repeats=2)
    assert (cost.samples, cost.calls, cost.rows, cost.calls_per_sample) == (10, 3, 60, 6)
    # In the second call: the last result (8,000, though only half is used), the doubled batch, the wide one, the new.
    assert cost.peak_bytes == 48_000
    assert 0.03 <= cost.seconds < 3
    assert not network._forward_pre_hooks


def test_memory_of_a_gpu_is_what_comes_on_top(monkeypatch: pytest.MonkeyPatch):
    """By the counters of CUDA, here played: the peak since sampling began, less what was held by then."""
    now = {"held": 1000, "peak": 9000}  # of something earlier

    def sample() -> Tensor:
        now["peak"] = max(now["peak"], now["held"] + 4200)
        return torch.ones(2)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now["held"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: now["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: now.update(peak=now["held"]))
    samples, peak = _peak_cuda(sample, torch.device("cuda"))
    assert peak == 4200 and torch.equal(samples, torch.ones(2))


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "reference", "message"),
    [
        (torch.zeros(5), torch.zeros(5, 2), r"samples: need features \[N, d\], got shape \[5\]"),
        (torch.zeros(5, 3), torch.zeros(5, 2), "samples have 3 features, the reference 2"),
        (torch.zeros(1, 2), torch.zeros(5, 2), "samples: at least 2 rows are needed, got 1"),
        (torch.zeros(5, 2), torch.tensor([[0.0, 0.0], [math.nan, 0.0]]), "reference: row 1 holds NaN or infinity"),
    ],
)
def test_bad_features_are_refused(samples: Tensor, reference: Tensor, message: str):
    """One line that says which set and what is wrong with it."""
    for metric in (frechet_distance, kernel_distance, energy_distance_unbiased):
        with pytest.raises(ValueError, match=message):
            metric(samples, reference)


def test_bad_settings_are_refused():
    """Each names the field and its value."""
    x = draw(70, 10, 2)
    for call, message in (
        (lambda: frechet_distance(x, x, directions=3), "directions=3"),
        (lambda: GaussianKernel(0.0), "bandwidth=0.0"),
        (lambda: wasserstein_1d(x, x, p=0.5), "p=0.5"),
        (lambda: bootstrap(float, x, Rng(0), repeats=1), "repeats=1"),
        (lambda: jackknife(float, x, Rng(0), groups=11), "groups=11"),
        (lambda: precision_recall(x, x, k=10), "at least 11 rows"),
        (lambda: memorisation(x, x, x), "copies of training data"),
        (lambda: nearest_distances(x, x[:, :1]), r"samples of shape \[2\], training data of shape \[1\]"),
        (lambda: accuracy(x, torch.zeros(3)), r"labels \[10\]"),
        (lambda: diversity(x, torch.arange(10)), "at least two samples"),
        (lambda: gaussian_frechet_distance(x[0], -torch.eye(2), x[0], torch.eye(2)), "not positive semi-definite"),
        (lambda: load_features("inception"), "features 'inception' do not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(FileNotFoundError, match="no Inception weights at"):
        load_features("inception:nowhere.pth")
    with pytest.raises(ValueError, match=r"take samples \[1, 8, 8\], got \[1, 9, 9\]"):
        load_features("digits")(torch.zeros(2, 1, 9, 9))
