"""The losses as functions: lists and options in, terms and tensors for the op out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, get_num_threads
from torch.compiler import is_dynamo_compiling

from ...dispatch import EPOCH, FORCED, assume_constant_result, autocasts, is_known, is_watched, needs_formula
from . import equations
from .backends import OP, Case
from .equations import IDENTITY, LEAKY_SQUARE, LECAM, MODES, SOFTPLUS, SQUARE, TILTED, Inputs, Mode, Term, Terms, value
from .op import Direct, is_eager, loss, loss_of_tensors, means_of

Logits = Any  # a tensor, or a list, nested to any depth, of tensors
Smoothing = float | tuple[float, float]


def adversarial_discriminator_loss(
    real_logits: Logits,
    fake_logits: Logits,
    mode: str = "non-saturating",
    *,
    scale: float = 1.0,
    smoothing: Smoothing = 0.0,
    reduction: str = "mean",
    across: str = "sum",
    real_weight: Tensor | None = None,
    fake_weight: Tensor | None = None,
    return_values: bool = False,
    process_group: Any = None,
    backend: str | None = None,
) -> Any:
    """The discriminator's loss: the mean over each tensor, real + fake added (no factor 0.5), summed over a list.

    Equivalent to, for mode "non-saturating" and one tensor each:
    `scale * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())`; the table of all modes is in
    ops/adversarial/equations.py.

    real_logits, fake_logits: a tensor of any shape, or a list, nested to any depth, of tensors of any shapes, one per
        discriminator; the two lists have one length. float64, float32, float16 or bfloat16; 16-bit logits accumulate in
        float32.
    mode: "non-saturating", "minimax", "hinge", "hinge2", "lsgan" (targets 1 and 0), "wasserstein", "relativistic" (each
        real logit is paired with the fake one in its place, so both have one shape), "relativistic-average",
        "relativistic-average-hinge", "relativistic-average-lsgan", "leaky-lsgan" or "tanh-hinge".
    smoothing: label smoothing, how far the target of real logits is below 1, or (that, how far the target of fake ones
        is above 0); for "non-saturating", "minimax", "lsgan" and "leaky-lsgan".
    reduction: over the elements of a tensor: "mean", "sum", or "none": the result is a list of their losses, each in
        the shape of its logits, real and fake of one discriminator side by side (of relativistic pairs one).
    across: over the discriminators: "sum" or "mean".
    real_weight, fake_weight: (B,) each, a weight for each sample, the first dimension of all logits, or None; with
        reduction "mean" the sum is still divided by the number of elements. Weights get no gradient. Relativistic
        pairs have one weight, `real_weight`.
    return_values: also return the detached value of each part of the loss, on the device: (K, 2) for real and fake of K
        discriminators, (K,) for relativistic pairs; they add up to the loss.
    process_group: over whose ranks the means of a relativistic average are averaged (torch.distributed); None: each
        rank has its own. Differentiable once.
    backend: "torch", "cpu", "cuda", "triton" or None (mmfast chooses).
    Returns the loss, a tensor without dimensions, in the logits' dtype (float32 under autocast); with return_values
        (loss, values).
    Differentiable to any order in eager.
    Raises ValueError for an unknown mode, reduction or backend, an empty list, lists of different lengths, pairs of
        different shapes or weights of another; RuntimeError for logits that are not floating point, and for logits and
        weights that are not on one device; TypeError for a scale or smoothing that is no number and a weight that is
        no tensor.
    """
    plain = real_weight is None and fake_weight is None and not return_values and process_group is None
    traced = is_dynamo_compiling()
    if plain and not traced and type(real_logits) is type(fake_logits) is Tensor and not is_watched():
        recipe = _remembered(discriminator_recipe, 1, mode, scale, smoothing, reduction, across)
        total = _at_once(recipe, (real_logits, fake_logits), backend)
        if total is not None:
            return total
    real, fake = _flat("real_logits", real_logits), _flat("fake_logits", fake_logits)
    if len(real) != len(fake):
        raise ValueError(
            f"real_logits has {len(real)} tensors and fake_logits {len(fake)}; expected one of each per discriminator"
        )
    # real and fake of one discriminator side by side, so that terms are added in the order a user would add them
    logits = [x for pair in zip(real, fake, strict=True) for x in pair]
    if plain and traced:
        total = _traced("discriminator", len(real), logits, mode, scale, smoothing, reduction, across, backend)
        if total is not None:
            return total
    recipe = _remembered(discriminator_recipe, len(real), mode, scale, smoothing, reduction, across)
    weights = real_weight, fake_weight
    return _adversarial(recipe, logits, weights, return_values, process_group, backend)


def adversarial_generator_loss(
    fake_logits: Logits,
    real_logits: Logits | None = None,
    mode: str = "non-saturating",
    *,
    scale: float = 1.0,
    reduction: str = "mean",
    across: str = "sum",
    real_weight: Tensor | None = None,
    fake_weight: Tensor | None = None,
    return_values: bool = False,
    process_group: Any = None,
    backend: str | None = None,
) -> Any:
    """The generator's loss: the mean over each tensor, summed over a list.

    Equivalent to, for mode "non-saturating" and one tensor: `scale * F.softplus(-fake_logits).mean()`; the table of all
    modes is in ops/adversarial/equations.py.

    fake_logits: a tensor of any shape, or a list, nested to any depth, of tensors of any shapes, one per discriminator.
    real_logits: likewise, for the relativistic modes, which compare with them; other modes do not look at them.
    return_values: the values are (K,), for relativistic averages (K, 2), of real and fake logits.
    All else: `adversarial_discriminator_loss`. ValueError where a relativistic mode has no real logits.
    """
    plain = real_weight is None and fake_weight is None and not return_values and process_group is None
    traced = is_dynamo_compiling()
    if plain and not traced and real_logits is None and type(fake_logits) is Tensor and not is_watched():
        recipe = _remembered(_generator_recipe, 1, mode, scale, 0.0, reduction, across)
        total = _at_once(recipe, (fake_logits,), backend)
        if total is not None:
            return total
    fake = _flat("fake_logits", fake_logits)
    if plain and traced:
        total = _traced("generator", len(fake), fake, mode, scale, 0.0, reduction, across, backend)
        if total is not None:
            return total
    recipe = _remembered(_generator_recipe, len(fake), mode, scale, 0.0, reduction, across)
    weights = real_weight, fake_weight
    if not recipe.pairing:
        return _adversarial(recipe, fake, (fake_weight,), return_values, process_group, backend)
    if real_logits is None:
        raise ValueError(f"mode {mode!r} compares with real logits; expected real_logits")
    real = _flat("real_logits", real_logits)
    if len(real) != len(fake):
        raise ValueError(
            f"real_logits has {len(real)} tensors and fake_logits {len(fake)}; expected one of each per discriminator"
        )
    logits = [x for pair in zip(real, fake, strict=True) for x in pair]
    return _adversarial(recipe, logits, weights, return_values, process_group, backend)


def matching_discriminator_loss(
    matching_logits: Logits,
    fake_logits: Logits,
    mismatched_logits: Logits,
    mode: str = "non-saturating",
    *,
    unconditional: tuple[Logits, Logits] | None = None,
    scale: float = 1.0,
    smoothing: Smoothing = 0.0,
    reduction: str = "mean",
    across: str = "sum",
    real_weight: Tensor | None = None,
    fake_weight: Tensor | None = None,
    mismatched_weight: Tensor | None = None,
    return_values: bool = False,
    backend: str | None = None,
) -> Any:
    """The loss of a discriminator that also judges whether a sample fits its condition: three or five kinds of logits.

    Equivalent to, with real(x) and fake(x) the mode's two terms: `real(matching) + (fake(fake_logits) +
    fake(mismatched)) / 2`; with unconditional = (r, f): `(real(matching) + real(r)) / 2 + (fake(fake_logits) +
    fake(mismatched) + fake(f)) / 3`.

    matching_logits: of real samples with their condition; fake_logits: of generated samples with theirs;
    mismatched_logits: of real samples with another's condition; unconditional: of real and generated samples without
        one. Each is a tensor or a list as in `adversarial_discriminator_loss`, all of one length.
    mode: any that is not relativistic.
    real_weight: of matching and of unconditional real logits; fake_weight: of generated ones; mismatched_weight.
    return_values: the values are (K, 3) or (K, 5), in the order matching, fake, mismatched, real, fake.
    All else: `adversarial_discriminator_loss`. The generator's loss is
    `adversarial_generator_loss([conditional, unconditional])`.
    Sources: Reed et al., arXiv:1605.05396, algorithm 1; with unconditional logits Xu et al., arXiv:1711.10485 (their
    program's factors).
    """
    kinds = [
        ("matching_logits", matching_logits),
        ("fake_logits", fake_logits),
        ("mismatched_logits", mismatched_logits),
    ]
    if unconditional is not None:
        kinds += [("unconditional[0]", unconditional[0]), ("unconditional[1]", unconditional[1])]
    lists = [_flat(*kind) for kind in kinds]
    if len({len(tensors) for tensors in lists}) > 1:
        counts = ", ".join(f"{name} {len(tensors)}" for (name, _), tensors in zip(kinds, lists, strict=True))
        raise ValueError(
            f"the lists have different numbers of tensors ({counts}); expected one of each per discriminator"
        )
    make = _matching_recipe if unconditional is None else _unconditional_matching_recipe
    recipe = _remembered(make, len(lists[0]), mode, scale, smoothing, reduction, across)
    logits = [x for group in zip(*lists, strict=True) for x in group]
    weights = (real_weight, fake_weight, mismatched_weight, real_weight, fake_weight)[: len(kinds)]
    return _adversarial(recipe, logits, weights, return_values, None, backend)


def lecam_penalty(
    real_logits: Logits,
    fake_logits: Logits,
    real_mean: Tensor,
    fake_mean: Tensor,
    *,
    scale: float = 1.0,
    real_weight: Tensor | None = None,
    fake_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """LeCam's regulariser of a discriminator: real logits are to stay below the fakes' mean, fakes above the reals'.

    Equivalent to, for one tensor each: `scale * (F.relu(real_logits - fake_mean).square().mean() + F.relu(real_mean -
    fake_logits).square().mean())`, summed over a list.

    real_mean, fake_mean: (K,) or (), running means of the logits of K discriminators; they get no gradient.
        `mmfast.nn.LeCam` keeps them.
    All else: `adversarial_discriminator_loss`.
    Source: Tseng et al., arXiv:2104.03310, with the rectifier of its authors' program.
    """
    real, fake = _flat("real_logits", real_logits), _flat("fake_logits", fake_logits)
    _check_tensor("real_mean", real_mean)
    _check_tensor("fake_mean", fake_mean)
    if not len(real) == len(fake) == real_mean.numel() == fake_mean.numel():
        raise ValueError(
            f"real_logits has {len(real)} tensors, fake_logits {len(fake)}, the means are of {real_mean.numel()} and "
            f"{fake_mean.numel()}; expected one of each per discriminator"
        )
    recipe = _remembered(_lecam_recipe, len(real), "lecam", scale, 0.0, "mean", "sum")
    logits = [x for pair in zip(real, fake, strict=True) for x in pair]
    # the real logits' centre is the fake logits' mean
    centres = torch.stack([fake_mean.detach().reshape(-1), real_mean.detach().reshape(-1)], 1).flatten()
    return _adversarial(recipe, logits, (real_weight, fake_weight), False, None, backend, centres)


def feature_matching(
    real_maps: Logits,
    fake_maps: Logits,
    *,
    distance: str = "l1",
    scale: float = 1.0,
    across: str = "sum",
    weights: Sequence[float] | None = None,
    sample_weight: Tensor | None = None,
    detach: bool = True,
    relative: bool = False,
    return_values: bool = False,
    backend: str | None = None,
) -> Any:
    """The distance between a discriminator's feature maps of real and of generated samples, of all maps in one pass.

    Equivalent to, for one map each: `scale * F.l1_loss(fake, real.detach())` or `F.mse_loss`, summed over all maps.

    real_maps, fake_maps: a tensor of any shape, or a list, nested to any depth (a list of maps for each discriminator);
        both alike. Dtypes as `adversarial_discriminator_loss`.
    distance: "l1" or "l2", the mean square.
    across: "sum" over all maps, or "mean": the mean at each level of the nesting (of a discriminator's maps, then of
        the discriminators); ValueError for a list without maps, which has none.
    weights: a factor for each map, in order, over all discriminators.
    sample_weight: (B,), a weight for each sample, the first dimension of all maps; the sum is still divided by the
        number of elements. It gets no gradient.
    detach: the real side gets no gradient (HiFi-GAN's program gives it one).
    relative: each map's distance is divided by the mean magnitude of its real side, which gets no gradient; for "l1".
    return_values: also return the detached value of each map, (K,).
    Returns the loss, or (loss, values), as `adversarial_discriminator_loss`; errors likewise.
    Sources: Salimans et al., arXiv:1606.03498; Larsen et al., arXiv:1512.09300; relative: Défossez et al.,
    arXiv:2210.13438, equation 2.
    """
    real, fake = _flat("real_maps", real_maps), _flat("fake_maps", fake_maps)
    if len(real) != len(fake):
        raise ValueError(f"real_maps has {len(real)} tensors and fake_maps {len(fake)}; expected the same maps of both")
    if distance not in ("l1", "l2"):
        raise ValueError(f"unknown distance {distance!r}; accepted: 'l1', 'l2'")
    if relative and distance != "l1":
        raise ValueError("relative distances are of distance='l1'; got distance='l2'")
    shares = _shares(fake_maps, across)
    if across == "mean" and _shares(real_maps, across) != shares:
        raise ValueError("real_maps and fake_maps are nested differently; expected one nesting for across='mean'")
    if weights is not None:
        if len(weights) != len(fake):
            raise ValueError(f"weights has {len(weights)} numbers for {len(fake)} maps; expected one for each")
        shares = tuple(share * float(weight) for share, weight in zip(shares, weights, strict=True))
    recipe = _remembered(_feature_recipe, shares, distance, scale)
    if detach:
        real = [x.detach() for x in real]
    _check_pairs(real, fake, "map")
    return _paired(recipe, fake, real, sample_weight, relative, return_values, backend)


class Recipe(NamedTuple):
    """A loss as the op's terms. pairing: a Mode's; kinds: how many terms a discriminator has; directs: `_at_once`'s."""

    terms: Terms
    directs: dict[tuple, Direct | None]
    mean: bool = True
    reduced: bool = True
    pairing: str = ""
    kinds: int = 1


_recipes: dict[tuple, Recipe] = {}


def _remembered(make: Callable[..., Recipe], *options: Any) -> Recipe:
    """make(*options), made once for the same options."""
    if is_dynamo_compiling():
        return make(*options)
    key = (make, *options)
    try:
        recipe = _recipes.get(key)
    except TypeError:  # of a list, as smoothing may be, there is no hash
        return make(*options)
    if recipe is None:
        if len(_recipes) > 1000:  # a scale that changes from step to step fills no memory
            _recipes.clear()
        recipe = _recipes[key] = make(*options)
    return recipe


def discriminator_recipe(
    count: int, mode: str, scale: float, smoothing: Smoothing, reduction: str, across: str
) -> Recipe:
    chosen = mode_of(mode)
    terms = _smoothed_terms(mode, chosen, smoothing)
    if chosen.pairing == "pairs":
        terms = terms[:1]
    return _recipe(terms, count, scale, reduction, across, chosen.pairing)


def _generator_recipe(count: int, mode: str, scale: float, _: float, reduction: str, across: str) -> Recipe:
    chosen = mode_of(mode)
    terms = [chosen.generator_real, chosen.generator] if chosen.pairing == "means" else [chosen.generator]
    return _recipe([term for term in terms if term is not None], count, scale, reduction, across, chosen.pairing)


def _matching_recipe(
    count: int, mode: str, scale: float, smoothing: Smoothing, reduction: str, across: str, both: bool = False
) -> Recipe:
    chosen = mode_of(mode)
    if chosen.pairing:
        raise ValueError(f"mode {mode!r} compares real with fake; expected a mode that is not relativistic")
    real, fake = _smoothed_terms(mode, chosen, smoothing)
    terms = [
        _scaled(real, 1 / 2),
        _scaled(fake, 1 / 3),
        _scaled(fake, 1 / 3),
        _scaled(real, 1 / 2),
        _scaled(fake, 1 / 3),
    ]
    if not both:
        terms = [real, _scaled(fake, 1 / 2), _scaled(fake, 1 / 2)]
    return _recipe(terms, count, scale, reduction, across, "")


def _unconditional_matching_recipe(
    count: int, mode: str, scale: float, smoothing: Smoothing, reduction: str, across: str
) -> Recipe:
    return _matching_recipe(count, mode, scale, smoothing, reduction, across, both=True)


def _lecam_recipe(count: int, _: str, scale: float, __: float, reduction: str, across: str) -> Recipe:
    return _recipe(LECAM, count, scale, reduction, across, "")


def _feature_recipe(shares: tuple[float, ...], distance: str, scale: float) -> Recipe:
    _check_number("scale", scale)
    phi = equations.ABS if distance == "l1" else SQUARE
    return Recipe(Terms(Term(phi, 1, 0, share * scale) for share in shares), {}, pairing="pairs")


def _recipe(terms: Sequence[Term], count: int, scale: float, reduction: str, across: str, pairing: str) -> Recipe:
    _check_number("scale", scale)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; accepted: 'mean', 'sum', 'none'")
    if across not in ("sum", "mean"):
        raise ValueError(f"across={across!r}; accepted: 'sum', 'mean'")
    scale = scale / count if across == "mean" else scale
    scaled = Terms([_scaled(term, scale) for term in terms] * count)
    mean = reduction == "mean"
    return Recipe(scaled, {}, mean, reduction != "none", pairing, len(terms))


def _check_number(name: str, option: Any) -> None:
    """TypeError also for a tensor: it would get no gradient, and a change of it in place would not be seen."""
    if not isinstance(option, Real):
        instead = " (a tensor may multiply the loss)" if isinstance(option, Tensor) else ""
        raise TypeError(f"{name} is a {type(option).__name__}; expected a number{instead}")


def _check_tensor(name: str, given: Any) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is a {type(given).__name__}; expected a tensor")


def mode_of(mode: str) -> Mode:
    """The mode of this name; ValueError for an unknown one."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; accepted: {', '.join(map(repr, MODES))}")
    return MODES[mode]


def _smoothed_terms(name: str, mode: Mode, smoothing: Smoothing) -> list[Term]:
    """The discriminator's terms with smoothed labels; ValueError where the mode has none."""
    given = smoothing if isinstance(smoothing, (tuple, list)) else (smoothing, 0.0)
    if len(given) != 2:
        raise ValueError(f"smoothing is {smoothing}; expected one number, or two for real and fake logits")
    real, fake = given
    _check_number("smoothing", real)
    _check_number("smoothing", fake)
    if not real and not fake:
        return [mode.real, mode.fake]
    if mode.pairing:
        raise _cannot_smooth(name)
    return [_smoothed(name, mode.real, real), _smoothed(name, mode.fake, -fake)]


def _smoothed(name: str, term: Term, below: float) -> Term:
    """The term with its target lowered by `below`."""
    if term.phi == SOFTPLUS:
        # cross entropy with the target t: t * softplus(-x) + (1 - t) * softplus(x)
        return term._replace(phi=TILTED, tilt=term.sign * below) if below else term
    if term.phi in (SQUARE, LEAKY_SQUARE):
        return term._replace(shift=term.shift + below)
    raise _cannot_smooth(name)


def _cannot_smooth(name: str) -> ValueError:
    return ValueError(
        f"mode {name!r} has no labels to smooth; expected one of 'non-saturating', 'minimax', 'lsgan', 'leaky-lsgan'"
    )


def _scaled(term: Term, scale: float) -> Term:
    return term if scale == 1 else term._replace(weight=term.weight * scale)


def _shares(maps: Logits, across: str, share: float = 1.0) -> tuple[float, ...]:
    """The factor of each tensor in a nested list."""
    if across not in ("sum", "mean"):
        raise ValueError(f"across={across!r}; accepted: 'sum', 'mean'")
    if isinstance(maps, Tensor):
        return (share,)
    if across == "mean":
        if not maps:
            raise ValueError("the maps hold an empty list, which has no mean; expected across='sum' or no such list")
        share = share / len(maps)
    return tuple(found for part in maps for found in _shares(part, across, share))


def _flat(name: str, logits: Logits) -> list[Tensor]:
    """The tensors of a list nested to any depth; errors for an empty list, and for what is no floating-point tensor."""
    if isinstance(logits, Tensor):
        tensors = [logits]
    else:
        tensors = []
        _collect(name, logits, tensors)
        if not tensors:
            raise ValueError(f"{name} is an empty list; expected a tensor or a list of at least one tensor")
    for x in tensors:
        if not x.is_floating_point():
            raise RuntimeError(f"{name} holds logits of dtype {x.dtype}; expected a floating-point dtype")
    return tensors


def _collect(name: str, logits: Any, tensors: list[Tensor]) -> None:
    if not isinstance(logits, (list, tuple)):
        raise TypeError(f"{name} holds a {type(logits).__name__}; expected a tensor or a list of tensors")
    for part in logits:
        if isinstance(part, Tensor):
            tensors.append(part)
        else:
            _collect(name, part, tensors)


def _check_pairs(real: Sequence[Tensor], fake: Sequence[Tensor], what: str) -> None:
    for r, f in zip(real, fake, strict=True):
        if r.shape != f.shape:
            raise ValueError(
                f"a real {what} has shape {tuple(r.shape)} and the fake one in its place {tuple(f.shape)}; "
                "expected one shape"
            )


def _alike(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in one dtype, autocast's choice or the widest; RuntimeError where they are on several devices."""
    first = tensors[0]
    dtype, device, same = first.dtype, first.device, True
    for x in tensors:
        if x.device != device:
            devices = sorted({str(x.device) for x in tensors})
            raise RuntimeError(f"the logits are on {' and '.join(devices)}; expected all on one device")
        if x.dtype != dtype:
            dtype, same = torch.promote_types(dtype, x.dtype), False
    if dtype.itemsize == 2 and autocasts(device.type):
        dtype, same = torch.float32, False
    return tensors if same else [x if x.dtype == dtype else x.to(dtype) for x in tensors]


def _adversarial(
    recipe: Recipe,
    logits: list[Tensor],
    weights: tuple[Tensor | None, ...],
    return_values: bool,
    group: Any,
    backend: str | None,
    centres: Tensor | None = None,
) -> Any:
    plain = group is None and centres is None and all(weight is None for weight in weights)
    if plain and not return_values and not is_watched():
        tensors = logits[::2] + logits[1::2] if recipe.pairing == "pairs" else logits
        total = _at_once(recipe, tensors, backend)
        if total is not None:
            return total
    logits = _alike(logits)
    if recipe.pairing == "pairs":
        if weights[1] is not None:
            raise ValueError("a pair of logits has one weight, its real sample's; expected real_weight alone")
        others, logits = logits[1::2], logits[::2]
        _check_pairs(logits, others, "tensor of logits")
        inputs = Inputs(logits, others, _element_weights(logits, weights[:1]))
    elif recipe.pairing == "means":
        peers = tuple(k ^ 1 for k in range(len(logits)))
        inputs = Inputs(logits, (), _element_weights(logits, weights), None, peers)
    else:
        if centres is not None:
            if centres.device != logits[0].device:
                raise RuntimeError(
                    f"the means are on {centres.device} and the logits on {logits[0].device}; expected one device"
                )
            centres = centres.to(equations.values_dtype(logits[0].dtype))
        inputs = Inputs(logits, (), _element_weights(logits, weights), centres)
    return _evaluate(recipe, inputs, return_values, group, backend)


def _paired(
    recipe: Recipe,
    fake: list[Tensor],
    real: list[Tensor],
    sample_weight: Tensor | None,
    relative: bool,
    return_values: bool,
    backend: str | None,
) -> Any:
    tensors = [*fake, *real]
    if not return_values and not relative and sample_weight is None and not is_watched():
        total = _at_once(recipe, tensors, backend)
        if total is not None:
            return total
    tensors = _alike(tensors)
    fake, real = tensors[: len(fake)], tensors[len(fake) :]
    inputs = Inputs(fake, real, _element_weights(fake, (sample_weight,)))
    if relative:
        detached = [x.detach() for x in real]
        magnitudes = means_of(Terms([Term(equations.ABS, 1, 0)] * len(real)), detached, _select(fake[0], True, backend))
        weights = magnitudes.reciprocal()[:, None]
        if sample_weight is not None:
            weights = weights * inputs.weights[0]
        inputs = inputs._replace(weights=list(weights.unbind()))
    return _evaluate(recipe, inputs, return_values, None, backend)


def _element_weights(logits: list[Tensor], weights: tuple[Tensor | None, ...]) -> Sequence[Tensor]:
    """One tensor of weights for each tensor of logits, in the values' dtype; weights: one for each kind of term."""
    if all(weight is None for weight in weights):
        return ()
    dtype = equations.values_dtype(logits[0].dtype)
    found = []
    for k, x in enumerate(logits):
        weight = weights[k % len(weights)]
        if weight is None:
            found.append(x.new_ones(1, dtype=dtype))
            continue
        _check_tensor("a weight", weight)
        if x.ndim == 0 or weight.shape != x.shape[:1]:
            raise ValueError(
                f"the weights have shape {tuple(weight.shape)} for logits of shape {tuple(x.shape)}; expected one "
                "weight for each sample, the logits' first dimension"
            )
        if weight.device != x.device:
            raise RuntimeError(f"the weights are on {weight.device} and the logits on {x.device}; expected one device")
        found.append(weight.detach().to(dtype))
    return found


def _at_once(recipe: Recipe, tensors: Sequence[Tensor], backend: str | None) -> Tensor | None:
    """The loss in one call of the CPU's kernel with the tensors themselves, or None where that does not serve them.

    Nothing may watch: `is_watched`.
    """
    x = tensors[0]
    if not x.is_cpu:
        return None
    threads = get_num_threads()
    key = EPOCH[0], backend, x.dtype, threads
    try:
        direct = recipe.directs[key]
    except KeyError:
        served = recipe.reduced and _select(x, True, backend) == "cpu"
        if len(recipe.directs) > 16:  # of choices that hold no more
            recipe.directs.clear()
        direct = recipe.directs[key] = Direct.of(recipe.terms, recipe.mean, recipe.pairing) if served else None
    return direct and loss_of_tensors(direct, threads, tensors)


def _traced(
    player: str,
    count: int,
    logits: list[Tensor],
    mode: str,
    scale: float,
    smoothing: Smoothing,
    reduction: str,
    across: str,
    backend: str | None,
) -> Tensor | None:
    """The loss in a graph, by PyTorch's formula; None where another way serves, or an error is to be raised.

    At each call a graph looks at all that Dynamo has read of this: few things, for each takes 20 ns (Zen 5).
    """
    if not isinstance(scale, float) or not isinstance(smoothing, float):
        return None
    if smoothing == 0:
        smoothing = 0.0
    elif not is_known(smoothing):  # of a symbol a constant would be made
        return None
    facts = [(x.device, x.dtype) for x in logits]
    recipe = _of_torch(player, (count, mode, 1.0, smoothing, reduction, across), facts, backend or FORCED[0])
    if recipe is None:
        return None
    total, *others = [value(term, recipe.mean, x) for term, x in zip(recipe.terms, logits, strict=True)]
    for other in others:
        total = total + other
    return total if scale == 1 else total * scale


@assume_constant_result
def _of_torch(
    player: str, options: tuple, facts: list[tuple[torch.device, torch.dtype]], backend: str | None
) -> Recipe | None:
    """The recipe of what PyTorch's formula serves, logits alone and alike; None of anything else."""
    device, dtype = facts[0]
    try:
        recipe = (discriminator_recipe if player == "discriminator" else _generator_recipe)(*options)
        chosen = OP.select(Case(device.type, dtype, recipe.reduced, traced=True), backend)
    except (TypeError, ValueError, RuntimeError):  # for Dynamo to see
        return None
    cast = dtype.itemsize == 2 and autocasts(device.type)
    if chosen != "torch" or recipe.pairing or not recipe.reduced or cast or len(set(facts)) > 1:
        return None
    # of a tuple's subclass Dynamo makes no constant
    return recipe._replace(terms=tuple(recipe.terms))  # type: ignore[arg-type]


def _select(x: Tensor, reduced: bool, backend: str | None) -> str:
    return OP.select_by((x.device, x.dtype, reduced), _case, backend)


def _case(device: torch.device, dtype: torch.dtype, reduced: bool) -> Case:
    return Case(device.type, dtype, reduced)


def _evaluate(recipe: Recipe, inputs: Inputs, return_values: bool, group: Any, backend: str | None) -> Any:
    chosen = _select(inputs.logits[0], recipe.reduced, backend)
    if not recipe.reduced:
        if group is not None and recipe.pairing == "means":
            raise ValueError("process_group is served for the reductions 'mean' and 'sum'; got reduction='none'")
        losses = equations.elements(recipe.terms, inputs)
        return (losses, _values([loss.sum() for loss in losses], recipe)) if return_values else losses
    if group is not None and not is_eager((*inputs.logits, *inputs.others)):
        raise RuntimeError("process_group is served in eager mode only; compile what is around the loss")
    if group is None and (chosen == "torch" or needs_formula([*inputs.logits, *inputs.others])):
        values = equations.values(recipe.terms, recipe.mean, inputs)
        total = equations.add_up(values)
        return (total, _values(values, recipe)) if return_values else total
    if group is not None and recipe.pairing == "means":
        inputs = inputs._replace(centres=_centres(inputs, chosen, group))
    total, found = loss(recipe.terms, recipe.mean, inputs, chosen, return_values, group)
    if found is None or not return_values:
        return total
    return total, found.view(-1, recipe.kinds) if recipe.kinds > 1 else found


def _centres(inputs: Inputs, chosen: str, group: Any) -> Tensor:
    """The mean of each tensor of logits, over all ranks of the group."""
    terms = _remembered(_mean_recipe, len(inputs.logits)).terms
    centres = means_of(terms, [x.detach() for x in inputs.logits], chosen)
    if group is not None:
        torch.distributed.all_reduce(centres.div_(group.size()), group=group)
    return centres


def _mean_recipe(count: int) -> Recipe:
    return Recipe(Terms([Term(IDENTITY, 1, 0)] * count), {})


def _values(values: list[Tensor], recipe: Recipe) -> Tensor:
    stacked = torch.stack([value.detach() for value in values])
    stacked = stacked.to(equations.values_dtype(stacked.dtype))
    return stacked.view(-1, recipe.kinds) if recipe.kinds > 1 else stacked


def batch_means(logits: Logits, backend: str | None = None) -> Tensor:
    """(K,): the mean of each of K tensors of logits, in one launch; without a gradient, in float32 or float64."""
    tensors = _alike([x.detach() for x in _flat("logits", logits)])
    terms = _remembered(_mean_recipe, len(tensors)).terms
    return means_of(terms, tensors, _select(tensors[0], True, backend))
