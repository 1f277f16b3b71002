"""Views against slow, obvious versions, and what is drawn against the probabilities it should have."""

import colorsys
import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from util.data import views
from util.data.views import (
    Crop,
    Jitter,
    Photometry,
    TwoViews,
    apply_crop,
    apply_photometry,
    centre_view,
    cover_size,
    draw_photometry,
    draw_resized_crop,
    draw_simple_crop,
    sample_generator,
    shift_hue,
)

quick = settings(max_examples=40, deadline=None)
LUCK = 1e-4  # the seeds are fixed: a test that passes once passes for ever


def picture(height, width, channels=3, seed=0):
    """Return a smooth picture with noise, so that neither resizing nor blur is trivial."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9 + c) + np.cos(y / (5 + c)) for c in range(channels)]
    pixels = 128 + 50 * np.stack(waves) + rng.normal(0, 20, (channels, height, width))
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))


def slow_resize(image, size):
    """Resize the whole image with torchvision."""
    return TF.resize(image, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)


def slow_cover_size(image_size, size):
    """Return the size by the larger of the two scales, in fractions, rounded down."""
    scale = max(Fraction(size[0], image_size[0]), Fraction(size[1], image_size[1]))
    return tuple(math.floor(side * scale) for side in image_size)


def slow_simple_crop(image, top, left, flip, size):
    """Resize, pad, slice, mirror."""
    resized = slow_resize(image, slow_cover_size(image.shape[-2:], size)).numpy()
    padded = np.pad(resized, ((0, 0), (4, 4), (4, 4)), mode="reflect")
    window = padded[:, top : top + size[0], left : left + size[1]]
    return window[:, :, ::-1] if flip else window


# ---- generator ---------------------------------------------------------------------------------------------


def test_each_sample_of_each_epoch_and_seed_has_its_own_randomness():
    keys = list(itertools.product([0, 1, 7, 2**32 - 1], [0, 1, 400], [0, 1, 2**20, (3 << 48) | (2 << 32)]))
    first = [sample_generator(*key).random(4).tolist() for key in keys]
    assert first == [sample_generator(*key).random(4).tolist() for key in keys]
    assert len({number for numbers in first for number in numbers}) == 4 * len(keys)


def test_neighbouring_samples_are_not_correlated():
    numbers = np.array([sample_generator(0, epoch, index).random(2) for epoch in range(20) for index in range(100)])
    assert stats.kstest(numbers[:, 0], "uniform").pvalue > LUCK
    assert stats.pearsonr(numbers[1:, 0], numbers[:-1, 0]).pvalue > LUCK
    assert stats.pearsonr(numbers[:, 0], numbers[:, 1]).pvalue > LUCK


# ---- simple resized crop -----------------------------------------------------------------------------------

sides = st.integers(1, 90)
targets = st.integers(8, 40)


@quick
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(8, 512), st.integers(8, 512))
@example(375, 500, 224, 224)
@example(500, 333, 224, 224)
@example(1, 1, 8, 8)
@example(1, 3000, 224, 224)
def test_cover_size_is_the_smallest_that_covers(h, w, height, width):
    covering = cover_size((h, w), (height, width))
    assert covering == slow_cover_size((h, w), (height, width))
    assert covering[0] == height or covering[1] == width
    assert covering[0] >= height
    assert covering[1] >= width
    if height == width:
        blank = torch.zeros(1, h, 1, dtype=torch.uint8).expand(1, h, w)
        if max(covering) <= 2000:
            assert covering == tuple(TF.resize(blank, [height], antialias=False).shape[-2:])


@quick
@given(sides, sides, targets, targets, st.sampled_from([1, 3, 4]), st.booleans(), st.integers(0, 2**32 - 1))
@example(1, 1, 8, 8, 3, False, 0)
@example(1, 90, 40, 8, 3, False, 0)
@example(90, 1, 8, 40, 1, True, 0)
@example(375, 500, 224, 224, 3, False, 1)
@example(1100, 700, 96, 160, 3, True, 2)
@example(224, 224, 224, 224, 3, False, 3)
def test_simple_resized_crop_equals_resize_pad_slice_flip(h, w, height, width, channels, shared, seed):
    image, size = picture(h, w, channels), (height, width)
    before = image.clone()
    actual = TwoViews(size, shared_crop=shared, photometric=False)(image, sample_generator(seed, 0, 0))
    assert torch.equal(image, before)
    assert actual.dtype == torch.uint8
    assert actual.shape == (2, channels, height, width)

    rng = sample_generator(seed, 0, 0)
    padded = tuple(side + 8 for side in slow_cover_size((h, w), size))
    crops = [draw_simple_crop(rng, padded, size, 0.5) for _ in range(2)]
    if shared:
        crops[1] = crops[0]
    for view, (top, left, *_, flip) in zip(actual, crops, strict=True):
        np.testing.assert_array_equal(view.numpy(), slow_simple_crop(image, top, left, flip, size))


@pytest.mark.parametrize("crop", ["src", "rrc"])
def test_views_do_not_depend_on_the_memory_layout(crop):
    planes = picture(61, 83)
    pixels = planes.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as decoders leave it
    assert planes.stride() != pixels.stride()
    make = TwoViews((32, 32), crop=crop)
    for index in range(8):
        assert torch.equal(make(planes, sample_generator(0, 0, index)), make(pixels, sample_generator(0, 0, index)))


def test_simple_crop_takes_every_place_as_often():
    rng = np.random.default_rng(0)
    crops = [draw_simple_crop(rng, (16, 20), (8, 12), 0.5) for _ in range(8100)]
    places = Counter((crop.top, crop.left) for crop in crops)
    assert set(places) == set(itertools.product(range(9), range(9)))
    assert stats.chisquare(list(places.values())).pvalue > LUCK
    assert {(crop.height, crop.width) for crop in crops} == {(8, 12)}
    flips = sum(crop.flip for crop in crops)
    assert stats.binomtest(flips, len(crops), 0.5).pvalue > LUCK
    for place in ((0, 0), (8, 8)):  # place and flip are independent
        here = [crop.flip for crop in crops if (crop.top, crop.left) == place]
        assert stats.binomtest(sum(here), len(here), 0.5).pvalue > LUCK


@pytest.mark.parametrize("crop", ["src", "rrc"])
@pytest.mark.parametrize(("hflip", "expected"), [(0.0, {False}), (1.0, {True})])
def test_hflip_of_0_and_1_are_never_and_always(crop, hflip, expected):
    make = TwoViews((16, 16), crop=crop, hflip=hflip)
    rng = np.random.default_rng(0)
    assert {make.draw_crop((40, 40), rng).flip for _ in range(200)} == expected


# ---- random resized crop -----------------------------------------------------------------------------------


@quick
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32 - 1))
@example(1, 1, 0)
@example(1, 3000, 0)
@example(3000, 1, 0)
def test_resized_crop_lies_in_the_image(h, w, seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        top, left, height, width, _ = draw_resized_crop(rng, (h, w), 0.5)
        assert min(height, width) >= 1
        assert min(top, left) >= 0
        assert top + height <= h
        assert left + width <= w


def test_resized_crop_is_distributed_as_torchvisions():
    h, w, draws = 300, 420, 3000
    rng = np.random.default_rng(1)
    crops = np.array([draw_resized_crop(rng, (h, w), 0.5)[:4] for _ in range(draws)], dtype=float)
    torch.manual_seed(1)
    blank = torch.zeros(1, h, w)
    torchvision_crops = [RandomResizedCrop.get_params(blank, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(draws)]

    def area(windows):
        return windows[:, 2] * windows[:, 3] / (h * w)

    def ratio(windows):
        return windows[:, 3] / windows[:, 2]

    torchvision_crops = np.array(torchvision_crops, dtype=float)
    columns = [lambda windows, k=k: windows[:, k] for k in range(4)]
    for measure in [area, ratio, *columns]:
        assert stats.ks_2samp(measure(crops), measure(torchvision_crops)).pvalue > LUCK
    assert area(crops).min() == pytest.approx(0.2, abs=0.01)
    assert 0.199 < area(crops).min() < area(crops).max() <= 1
    assert 0.74 < ratio(crops).min() < 0.76
    assert 1.32 < ratio(crops).max() < 1.35


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (1, 50), (50, 1), (7, 400)])
def test_resized_crop_of_an_image_that_is_too_long_is_its_centre(size):
    expected = RandomResizedCrop.get_params(torch.zeros(1, *size), [0.2, 1.0], [3 / 4, 4 / 3])
    rng = np.random.default_rng(0)
    assert {draw_resized_crop(rng, size, 0.0)[:4] for _ in range(20)} == {tuple(expected)}


@quick
@given(sides, sides, targets, targets, st.integers(0, 2**32 - 1))
@example(1, 1, 8, 8, 0)
@example(600, 900, 224, 160, 0)
def test_random_resized_crop_equals_cut_and_resize(h, w, height, width, seed):
    image, size = picture(h, w), (height, width)
    actual = TwoViews(size, crop="rrc", photometric=False)(image, sample_generator(seed, 0, 0))
    rng = sample_generator(seed, 0, 0)
    for view in actual:
        top, left, crop_height, crop_width, flip = draw_resized_crop(rng, (h, w), 0.5)
        window = image[:, top : top + crop_height, left : left + crop_width].contiguous()
        expected = slow_resize(window, size)
        assert torch.equal(view, expected.flip(-1) if flip else expected)


def test_apply_crop_mirrors_left_and_right():
    image = torch.arange(24, dtype=torch.uint8).view(1, 4, 6)
    window = apply_crop(image, Crop(1, 2, 2, 3, flip=True), (2, 3))
    assert window.tolist() == [[[10, 9, 8], [16, 15, 14]]]


# ---- both views --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["src", "rrc"])
@pytest.mark.parametrize("shared", [False, True])
def test_view_u_is_the_same_with_and_without_view_v(crop, shared):
    image = picture(50, 70)
    one = TwoViews((32, 32), 1, crop, shared)
    two = TwoViews((32, 32), 2, crop, shared)
    plain = TwoViews((32, 32), 2, crop, shared, photometric=False)
    same_crop = same_colours = 0
    for index in range(20):
        u, v = two(image, sample_generator(3, 1, index))
        (alone,) = one(image, sample_generator(3, 1, index))
        u_plain, v_plain = plain(image, sample_generator(3, 1, index))
        assert torch.equal(u, alone)
        assert torch.equal(u, u_plain)
        same_crop += torch.equal(u_plain, v_plain)
        same_colours += torch.equal(v, v_plain)
    assert same_crop == (20 if shared else 0)
    assert same_colours <= 4  # without jitter the smallest blur changes nothing


def test_view_v_is_a_crop_then_the_drawn_photometry():
    image, size = picture(50, 70), (32, 32)
    for index in range(30):
        u, v = TwoViews(size, shared_crop=True)(image, sample_generator(0, 0, index))
        rng = sample_generator(0, 0, index)
        draw_simple_crop(rng, (40, 52), size, 0.5)
        assert torch.equal(v, apply_photometry(u, draw_photometry(rng)))


@pytest.mark.parametrize("crop", ["src", "rrc"])
def test_views_repeat_by_seed_epoch_and_index_and_differ_otherwise(crop):
    image, make = picture(50, 70), TwoViews((32, 32), crop=crop)
    keys = list(itertools.product([0, 1], [0, 1], [0, 1]))
    first = [make(image, sample_generator(*key)) for key in keys]
    again = [make(image, sample_generator(*key)) for key in reversed(keys)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))


def test_views_do_not_depend_on_the_number_of_threads():
    image, make = picture(300, 400), TwoViews((224, 224))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([make(image, sample_generator(0, 0, index)) for index in range(12)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- what is drawn for the photometry ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    return [draw_photometry(rng) for _ in range(6000)]


def test_jitter_and_branches_are_drawn_with_their_probabilities(drawn):
    jittered = sum(photometry.jitter is not None for photometry in drawn)
    assert stats.binomtest(jittered, len(drawn), 0.8).pvalue > LUCK
    branches = Counter(photometry.branch for photometry in drawn)
    assert set(branches) == {"grey", "solarise", "blur"}
    assert stats.chisquare(list(branches.values())).pvalue > LUCK
    both = Counter((photometry.jitter is not None, photometry.branch) for photometry in drawn)
    table = [[both[here, branch] for branch in branches] for here in (True, False)]
    assert stats.chi2_contingency(table).pvalue > LUCK  # independent of each other


def test_jitter_factors_and_radius_are_uniform(drawn):
    jitters = [photometry.jitter for photometry in drawn if photometry.jitter is not None]
    ranges = dict(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.8, 1.2), hue=(-0.1, 0.1))
    for name, (low, high) in ranges.items():
        values = np.array([getattr(jitter, name) for jitter in jitters])
        assert low <= values.min() <= values.max() <= high
        assert stats.kstest(values, "uniform", args=(low, high - low)).pvalue > LUCK
    radii = np.array([photometry.radius for photometry in drawn])
    assert 0.1 <= radii.min() < 0.11
    assert 1.99 < radii.max() <= 2.0
    assert stats.kstest(radii, "uniform", args=(0.1, 1.9)).pvalue > LUCK


def test_all_orders_of_jitter_occur_as_often(drawn):
    orders = Counter(photometry.jitter.order for photometry in drawn if photometry.jitter is not None)
    assert set(orders) == set(itertools.permutations(range(4)))
    assert stats.chisquare(list(orders.values())).pvalue > LUCK


# ---- what is done to the colours ---------------------------------------------------------------------------

NONE = Jitter(1.0, 1.0, 1.0, 0.0, (0, 1, 2, 3))


def test_grey_is_the_luminance_in_all_channels():
    image = picture(20, 30)
    grey = apply_photometry(image, Photometry(None, "grey", 1.0))
    assert grey.shape == image.shape
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])
    red, green, blue = image.double()
    assert (grey[0] - (0.299 * red + 0.587 * green + 0.114 * blue)).abs().max() < 1.01


def test_solarise_inverts_what_is_at_least_128():
    ramp = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(3, 16, 16)
    expected = [255 - x if x >= 128 else x for x in ramp.flatten().tolist()]
    assert apply_photometry(ramp, Photometry(None, "solarise", 1.0)).flatten().tolist() == expected


def slow_blur(image, radius):
    """Weighted sums over the mirrored surroundings of each pixel."""
    reach = min(math.ceil(3 * radius), image.shape[1] - 1, image.shape[2] - 1)
    weights = {k: math.exp(-k * k / (2 * radius**2)) for k in range(-reach, reach + 1)}
    total = sum(weights.values())
    padded = np.pad(image.double().numpy(), ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    blurred, (_, h, w) = np.zeros(image.shape), image.shape
    for (dy, a), (dx, b) in itertools.product(weights.items(), repeat=2):
        blurred += a * b / total**2 * padded[:, reach + dy : reach + dy + h, reach + dx : reach + dx + w]
    return blurred


@quick
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.floats(0.1, 2.0))
@example(1, 1, 3, 2.0)
@example(1, 30, 3, 2.0)
@example(224, 224, 3, 2.0)
def test_blur_is_a_gaussian(h, w, channels, radius):
    image = picture(h, w, channels)
    blurred = apply_photometry(image, Photometry(None, "blur", radius))
    assert blurred.dtype == torch.uint8
    assert np.abs(blurred.numpy() - slow_blur(image, radius)).max() <= 0.51  # half a level, and float32


def test_blur_keeps_the_mean_and_takes_contrast_away():
    image = picture(64, 64)
    for radius in (0.5, 1.0, 2.0):
        blurred = apply_photometry(image, Photometry(None, "blur", radius)).double()
        assert abs(blurred.mean() - image.double().mean()) < 0.5
        assert blurred.std() < image.double().std()


@quick
@given(
    st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=40),
    st.one_of(st.just(0.0), st.floats(-0.1, 0.1)),
)
@example([(0, 0, 0), (255, 255, 255), (77, 77, 77), (255, 0, 0), (0, 255, 0), (0, 0, 255)], 0.1)
@example([(255, 255, 0), (0, 255, 255), (255, 0, 255), (1, 0, 0), (254, 255, 255)], -0.1)
def test_shift_hue_equals_colorsys(colours, shift):
    image = torch.tensor(colours, dtype=torch.uint8).T.reshape(3, 1, -1)
    actual = shift_hue(image, shift)
    for before, after in zip(colours, actual[:, 0].T.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(x / 255 for x in before))
        expected = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
        assert max(abs(255 * x - y) for x, y in zip(expected, after, strict=True)) <= 0.501
    if shift == 0:
        assert torch.equal(actual, image)


def test_shift_hue_equals_torchvision_within_a_level():
    image = picture(64, 64)
    for shift in (-0.1, -0.033, 0.0, 0.05, 0.1):
        assert (shift_hue(image, shift).int() - TF.adjust_hue(image, shift).int()).abs().max() <= 1


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_jitter_is_done_in_its_order_and_before_the_branch(order):
    image = picture(30, 40)
    jitter = Jitter(1.3, 0.7, 1.15, 0.08, order)
    steps = {
        0: lambda x: TF.adjust_brightness(x, 1.3),
        1: lambda x: TF.adjust_contrast(x, 0.7),
        2: lambda x: TF.adjust_saturation(x, 1.15),
        3: lambda x: shift_hue(x, 0.08),
    }
    expected = image
    for step in order:
        expected = steps[step](expected)
    for branch in ("grey", "solarise", "blur"):
        actual = apply_photometry(image, Photometry(jitter, branch, 1.0))
        assert torch.equal(actual, apply_photometry(expected, Photometry(None, branch, 1.0)))


def test_jitter_of_ones_changes_nothing():
    image = picture(30, 40)
    for branch in ("grey", "solarise", "blur"):
        actual = apply_photometry(image, Photometry(NONE, branch, 1.0))
        assert torch.equal(actual, apply_photometry(image, Photometry(None, branch, 1.0)))


def test_brightness_contrast_and_saturation_are_blends_with_black_the_mean_and_grey():
    image = picture(30, 40)
    grey = (0.299 * image[0].double() + 0.587 * image[1] + 0.114 * image[2]).expand(3, 30, 40)
    blends = dict(brightness=(1.4, 0.0), contrast=(0.6, grey.mean()), saturation=(0.8, grey))
    for name, (factor, other) in blends.items():
        actual = apply_photometry(image, Photometry(NONE._replace(**{name: factor}), "solarise", 1.0))
        expected = (factor * image.double() + (1 - factor) * other).clamp(0, 255)
        unsolarised = torch.stack([actual, 255 - actual]).double()
        assert (unsolarised - expected).abs().amin(0).max() < 1.3  # two roundings


def test_one_channel_passes_through():
    image = picture(40, 50, 1)
    assert torch.equal(apply_photometry(image, Photometry(None, "grey", 1.0)), image)
    colours = NONE._replace(saturation=0.8, hue=0.1)
    assert torch.equal(apply_photometry(image, Photometry(colours, "grey", 1.0)), image)
    for index in range(30):
        actual = TwoViews((32, 32))(image, sample_generator(0, 0, index))
        assert actual.shape == (2, 1, 32, 32)
        assert actual.dtype == torch.uint8


# ---- evaluation --------------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([(8, 8), (32, 48), (64, 64), (96, 96), (112, 98)]))
@example(375, 500, (224, 224))
@example(1, 1, (224, 224))
@example(500, 300, (160, 224))
def test_centre_view_is_the_centre_of_the_resized_image(h, w, size):
    image = picture(h, w)
    larger = size if min(size) < 96 else tuple(side * 256 // 224 for side in size)
    resized = slow_resize(image, slow_cover_size((h, w), larger))
    top, left = (round((have - want) / 2) for have, want in zip(resized.shape[-2:], size, strict=True))
    actual = centre_view(image, size)
    assert actual.dtype == torch.uint8
    assert torch.equal(actual, resized[:, top : top + size[0], left : left + size[1]])


def test_centre_view_of_224_pixels_is_the_usual_256_and_224():
    image = picture(300, 400)
    usual = TF.center_crop(TF.resize(image, [256], interpolation=InterpolationMode.BICUBIC, antialias=True), [224])
    assert torch.equal(centre_view(image, (224, 224)), usual)


@pytest.mark.parametrize("side", [256, 384])
def test_centre_view_above_224_pixels_is_all_of_the_shorter_side(side):
    """MAE's evaluation does the same."""
    image = torch.randint(0, 256, (3, side, side + 20), dtype=torch.uint8)
    assert torch.equal(centre_view(image, (side, side)), image[..., 10 : side + 10])


@pytest.mark.parametrize(("side", "resized"), [(96, 109), (144, 164), (160, 182), (208, 237), (224, 256), (384, 384)])
def test_evaluation_resizes_to_the_integer_part(side, resized):
    """MAE (util/datasets.py, build_transform) and timm (transforms_imagenet_eval): int(side / crop share)."""
    image = picture(240, 320)
    larger = TF.resize(image, [resized], interpolation=InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(centre_view(image, (side, side)), TF.center_crop(larger, [side]))


def test_centre_view_of_a_small_image_is_all_of_it():
    image = picture(32, 32)
    assert torch.equal(centre_view(image, (32, 32)), image)


def test_constants_are_the_papers():
    assert views.REFLECT_PAD == 4
    assert views.RRC_SCALE == (0.2, 1.0)
    assert views.RRC_RATIO == (3 / 4, 4 / 3)
