"""TreeVAE: a variational autoencoder whose latents form a tree (Manduchi et al., arXiv 2306.08984).

Generative model: `z_0 ~ N(0, I)`. At every node with two children a router decides `c_i ~ Bernoulli(r_p(z_i))`, left or
right. A child's latent is `z_i ~ N(mu_p(z_parent), sigma_p^2(z_parent))`. The leaf's decoder gives `p(x | z_leaf)`.

Inference: an encoder and a ladder of bottom-up blocks give features `d_h` for each depth `h`. Posterior routers read
`d_h`, and each node's Gaussian head reads `d_h` and is merged with the prior from the sampled parent by precision.

Letters: `B` batch, `C H W` image, `N` nodes, `I` routed nodes, `K` leaves, `D` latent width, `T` visits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from treediff.core import io
from treediff.core.checks import check_batch, check_size
from treediff.core.groups import Groups
from treediff.core.modes import evaluating, lasting
from treediff.core.rows import Indexable, Rows
from treediff.layers.likelihood import Likelihood
from treediff.tree.files import from_header, header_of, require_topology
from treediff.tree.probability import precision_weighted_merge, reparameterize, sample_leaf
from treediff.tree.topology import TreeTopology
from treediff.tree.visits import Visits, descend
from treediff.treevae._trial import try_parts
from treediff.treevae.banks import NodeBanks
from treediff.treevae.posterior import ELBO, TreePosterior, leaf_log_probs_of
from treediff.treevae.presets import TreeParts, image_parts, latent_shape, vector_parts
from treediff.treevae.prior import LeafSamples, TreeSample, sample, sample_leaves

__all__ = ["TreeVAE"]


class TreeVAE(nn.Module):
    """A tree of latent variables with one decoder per leaf.

    `TreeVAE.for_images` and `TreeVAE.for_vectors` choose good parts. Networks of nodes are given as templates, of which
    each node gets its own copy, see `NodeBanks`. A single root is a plain VAE, a chain a LadderVAE (arXiv 1602.02282).

    Args:
        topology: the tree to start with.
        encoder: observations to the features of the deepest level, `(B, *inputs)` to `(B, *features)`;
            `features` is `(width,)` or `(width, h, w)`, with the `h` and `w` of the latent in a factory's encoder.
        bottom_up: blocks of the ladder, from the deepest level up, `(B, *features)` to `(B, *features)`;
            `len(bottom_up)` is the tree's greatest depth.
        head: a node's Gaussian from features, `(B, *features)` to `(B, 2D)` or `(B, 2D, h, w)`; the mean is first.
        transition: a child's prior from the parent's latent, `(B, *latent)` to `(B, 2D)` or `(B, 2D, h, w)`.
        posterior_router: features to the logit of going left, `(B, *features)` to `(B,)`.
        prior_router: latent to the logit of going left, `(B, *latent)` to `(B,)`.
        decoder: a leaf's latent to the raw output that the likelihood reads, `(B, *latent)` to `(B, *inputs)` for the
            likelihoods of `treediff.layers`.
        likelihood: distribution of observations given the decoder's output.
        latent: shape of one latent, `(D,)` or `(D, h, w)`.
        inputs: shape of one observation.
        generator: source of the node networks' initial weights; if not given, the seed follows from the tree.
        device: of the node networks; by default the device of the templates.
        dtype: of the node networks.

    Attributes:
        banks: the networks of the nodes, and the tree.
        config: factory and arguments that built the model; None for a model that was built from parts.

    Raises:
        TypeError: if `topology` is no TreeTopology, or a network of nodes has a layer without a way to draw fresh
            weights, see `treediff.layers.initialize`.
        ValueError: if the tree is deeper than the ladder, a template has buffers, or a part does not fit. Every part
            runs on two rows when the model is built.

    Examples:
        >>> model = TreeVAE.for_images(size=8, topology=TreeTopology.balanced(1))
        >>> model.cluster(torch.rand(3, 1, 8, 8)).shape
        torch.Size([3])
    """

    def __init__(
        self,
        *,
        topology: TreeTopology,
        encoder: nn.Module,
        bottom_up: Sequence[nn.Module],
        head: nn.Module,
        transition: nn.Module,
        posterior_router: nn.Module,
        prior_router: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        latent: tuple[int, ...],
        inputs: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.latent, self.inputs = tuple(latent), tuple(inputs)
        self.encoder, self.bottom_up = encoder, nn.ModuleList(bottom_up)
        self.banks = NodeBanks(
            topology,
            head=head,
            transition=transition,
            posterior_router=posterior_router,
            prior_router=prior_router,
            decoder=decoder,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self.likelihood = likelihood
        self.config: dict[str, Any] | None = None
        self._require_depth(topology)
        try_parts(encoder, bottom_up, self.banks, likelihood, self.latent, self.inputs)

    @classmethod
    def for_images(
        cls,
        *,
        size: int | tuple[int, int],
        channels: int = 1,
        latent: int | tuple[int, ...] = 8,
        width: int = 128,
        max_depth: int = 8,
        network: str = "conv",
        likelihood: str | Likelihood = "bernoulli",
        topology: TreeTopology | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **parts: Unpack[TreeParts],
    ) -> Self:
        """Build a model for images in [0, 1].

        Args:
            size: height and width, or one number for both.
            channels: 1 for grey, 3 for colour.
            latent: width of a latent vector, or `(channels, h, w)` for latents that are maps.
            width: width of features and hidden layers; a residual network's channels are proportional to it.
            max_depth: greatest depth the tree may grow to.
            network: 'conv' for small images, 'mlp' for tiny ones, 'residual' for colour.
            likelihood: 'bernoulli', 'gaussian' (variance 1/2), 'gaussian_learned', or a module.
            topology: the tree to start with; a single root by default, which growth splits.
            generator: source of the initial weights; the seed 0 if not given.
            device: of the model.
            dtype: of the weights.
            **parts: modules in place of the chosen modules, such as `decoder=`; see `TreeVAE`. A file of the model
                names these parts, and `load` expects them again.

        Raises:
            TypeError: if a number is not whole.
            ValueError: if a number is out of range, or there is no such network or likelihood.

        Examples:
            >>> model = TreeVAE.for_images(size=28, topology=TreeTopology.balanced(1))
            >>> model.elbo(torch.rand(4, 1, 28, 28)).elbo.shape
            torch.Size([4])
        """
        arguments: dict[str, Any] = {
            "size": check_size("size", size),
            "channels": channels,
            "latent": latent_shape(latent),
            "width": width,
            "max_depth": max_depth,
            "network": network,
            "likelihood": likelihood,
        }
        made = image_parts(**arguments, generator=generator, device=device, dtype=dtype)
        return cls._recorded("for_images", arguments, made, parts, topology)

    @classmethod
    def for_vectors(
        cls,
        *,
        features: int,
        latent: int = 8,
        width: int = 128,
        max_depth: int = 8,
        likelihood: str | Likelihood = "gaussian_learned",
        topology: TreeTopology | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **parts: Unpack[TreeParts],
    ) -> Self:
        """Build a model for vectors of `features` numbers: tables, text features; other arguments as for `for_images`.

        Examples:
            >>> model = TreeVAE.for_vectors(features=5)
            >>> model.cluster(torch.randn(3, 5))
            tensor([0, 0, 0])
        """
        arguments: dict[str, Any] = {"features": features, "latent": latent, "width": width, "max_depth": max_depth}
        arguments |= {"likelihood": likelihood}
        made = vector_parts(**arguments, generator=generator, device=device, dtype=dtype)
        return cls._recorded("for_vectors", arguments, made, parts, topology)

    @classmethod
    def _recorded(
        cls,
        factory: str,
        arguments: dict[str, Any],
        made: dict[str, Any],
        given: TreeParts,
        topology: TreeTopology | None,
    ) -> Self:
        """Build a model from parts, some of them custom, and record its configuration."""
        own: dict[str, Any] = dict(given)
        if not isinstance(arguments["likelihood"], str):
            own["likelihood"] = arguments.pop("likelihood")
        model = cls(topology=topology or TreeTopology.balanced(0), **{**made, **own})
        model.config = io.record(factory, arguments, own)
        return model

    @property
    def topology(self) -> TreeTopology:
        """Tree of the model."""
        return self.banks.topology

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    def extra_repr(self) -> str:
        """Return the tree and the shapes, for `print(model)`."""
        return f"topology={self.topology}, inputs={self.inputs}, latent={self.latent}"

    # --- the tree changes ---------------------------------------------------------------------------------

    def split(
        self, leaf: int, *, warm_start: bool = False, generator: torch.Generator | None = None
    ) -> tuple[int, int]:
        """Turn a leaf into a parent of two new leaves, whose ids are returned.

        The leaf's decoder is removed. With `warm_start` the children begin with copies of that decoder and of the
        leaf's head, otherwise with fresh weights. Transitions and routers are always fresh. No other node changes.

        Raises:
            KeyError: if there is no such node.
            ValueError: if the node is not a leaf, or is at the greatest depth.
        """
        self._require_depth(self.topology.split(leaf))
        return self.banks.split(leaf, warm_start=warm_start, generator=generator)

    def prune(self, leaf: int) -> None:
        """Remove a leaf, and ancestors left without children; a parent with one child left decides no longer.

        The probability of the leaf goes to its sibling.

        Raises:
            KeyError: if there is no such node.
            ValueError: if the node is not a leaf, or is the only leaf.
        """
        self.banks.become(self.topology.prune(leaf))

    def become(self, topology: TreeTopology) -> None:
        """Change to another tree, such as the tree of weights to be loaded; new nodes have fresh, untrained weights.

        Raises:
            ValueError: if the tree is deeper than the ladder.
        """
        self._require_depth(topology)
        self.banks.become(topology)

    def _require_depth(self, topology: TreeTopology) -> None:
        if topology.max_depth > len(self.bottom_up):
            raise ValueError(
                f"a tree of depth {topology.max_depth} needs as many bottom-up blocks, this model has "
                f"{len(self.bottom_up)}; build it with a greater max_depth"
            )

    # --- files --------------------------------------------------------------------------------------------

    def save(self, path: io.Path) -> None:
        """Write weights, tree and configuration to one safetensors file; see `treediff.core.io`."""
        io.save_model(self, path, header_of(self))

    @classmethod
    @lasting()
    def load(cls, path: io.Path, *, model: Self | None = None, **parts: Unpack[TreeParts]) -> Self:
        """Read a model from a file of `save`; every tensor is bit-equal.

        Args:
            path: the file.
            model: a model to fill, if the saved model was built from parts; its tree is replaced by the file's tree.
                The model does not change if the file does not fit.
            **parts: the modules that were given to the factory in place of its own modules.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, foreign, of another version, or does not fit; or if parts are missing.
        """
        header, tensors = io.read_model(path, cls.__name__)
        if model is None:
            model = from_header(cls, header, path, parts)
        else:
            topology = require_topology(header, path)
            trial = copy.deepcopy(model)
            trial.become(topology)
            io.fill(trial, tensors, path)
            model.become(topology)
        io.fill(model, tensors, path)
        return model

    # --- one traversal ------------------------------------------------------------------------------------

    def features(self, x: Tensor) -> Tensor:
        """Compute the bottom-up ladder: features `d_h` for depths 0 (root) to `len(bottom_up)`, `(depths, B, ...)`."""
        ladder = [self.encoder(x)]
        for block in self.bottom_up:
            ladder.append(block(ladder[-1]))
        return torch.stack(ladder[::-1])

    def route(
        self,
        features: Tensor,
        *,
        nodes: Sequence[int] | None = None,
        threshold: float = 0.0,
        chance: Tensor | None = None,
        leaf: Tensor | None = None,
    ) -> Visits:
        """Follow the posterior routers down the tree; only routers run. Arguments as for `visits.descend`."""
        batch, rows = features.shape[1], features.flatten(0, 1)
        plan = self.banks.plan(nodes, features.device)

        def logits(image: Tensor, node: Tensor, groups: Groups, ids: list[int]) -> Tensor:
            return self.banks.posterior_routers(rows.index_select(0, plan.ladder_rows(image, node, batch)), groups, ids)

        return descend(plan, batch, logits, threshold=threshold, chance=chance, leaf=leaf, like=features)

    def posterior(
        self,
        x: Tensor,
        *,
        nodes: Sequence[int] | None = None,
        leaf: Tensor | None = None,
        threshold: float = 0.0,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TreePosterior:
        """Compute the posterior of `x`, in one pass from the root to the leaves.

        Args:
            x: `(B, *inputs)`, in the range of the likelihood.
            nodes: ids to visit, closed under taking parents; all by default.
            leaf: `(B,)` leaf ids; each image then visits only the path to its own leaf.
            threshold: nodes that an image reaches with less probability than this are not visited. 0 is exact.
            noise: `(B, N, *latent)` standard normal, one per image and node of `topology.ids`; drawn if not given.
            generator: source of the noise.

        Returns:
            the posterior, from which bounds, clusters and reconstructions are read.

        Raises:
            TypeError: if `x`, `leaf` or `noise` has the wrong dtype.
            KeyError: if an id in `nodes` is unknown, or an id in `leaf` is not the id of a leaf to visit.
            ValueError: if `x` has another shape, is not finite, or leaves the range of the data. Also if `leaf` or
                `noise` has another shape, `nodes` lacks a parent, or the threshold is no probability below 1.
        """
        self.check(x)
        features, plan = self.features(x), self.banks.plan(nodes, x.device)
        ranks = None if leaf is None else plan.leaf_ranks(leaf, len(x))
        visits = self.route(features, nodes=nodes, threshold=threshold, leaf=ranks)
        return self.latents(features, visits, noise=noise, generator=generator)

    def latents(
        self,
        features: Tensor,
        visits: Visits,
        *,
        noise: Tensor | None = None,
        from_prior: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TreePosterior:
        """Compute the second half of `posterior`: Gaussians, samples and prior decisions for given visits.

        Noise is given for every image and node, `(B, N, *latent)`, or for the visits alone, `(T, *latent)`. For images
        of `from_prior`, `(B,)` booleans, only the root's latent depends on `features`; deeper latents follow the prior.
        """
        where = visits.plan.ladder_rows(visits.image, visits.node, visits.batch)
        rows = features.flatten(0, 1).index_select(0, where)
        hats = self.banks.heads(rows, visits.groups(), visits.plan.nodes)
        if from_prior is not None:
            # A head with infinite variance leaves the prior unchanged when both are merged, exactly.
            silent = from_prior[visits.image] & (visits.parent >= 0)
            mean, logvar = hats.chunk(2, 1)
            hats = torch.cat([mean, torch.where(silent.view(-1, *[1] * (hats.ndim - 1)), torch.inf, logvar)], 1)
        shape = (len(rows), *self.latent)
        if noise is None:
            noise = torch.randn(shape, generator=generator, dtype=hats.dtype, device=rows.device)
        elif not noise.is_floating_point():
            raise TypeError(f"noise must be standard normal, found {noise.dtype}; draw it with torch.randn")
        elif noise.shape != shape:
            wanted = (visits.batch, len(self.topology), *self.latent)
            if noise.shape != wanted:
                raise ValueError(
                    f"noise must have one standard normal latent for each image and node, shape {wanted}; found "
                    f"{tuple(noise.shape)}"
                )
            noise = noise[visits.image, visits.plan.rank[visits.node]]
        return self._top_down(visits, hats, noise.to(hats.dtype))

    def _top_down(self, visits: Visits, hats: Tensor, noise: Tensor) -> TreePosterior:
        """Merge priors from sampled parents with the Gaussians of the heads, level by level."""
        plan, sizes = visits.plan, [stop - start for start, stop in pairwise(visits.starts)]
        columns = (hats, noise, visits.node, visits.parent)
        (hat, own_noise, _, _), *below = zip(*(column.split(sizes) for column in columns), strict=True)
        mean, logvar = hat.chunk(2, 1)
        samples, posteriors, priors = [reparameterize(mean, logvar, own_noise)], [hat], [torch.zeros_like(hat)]
        for level, start, (hat, own_noise, node, parent) in zip(plan.levels[1:], visits.starts, below, strict=False):
            parents = samples[-1].index_select(0, parent - start)
            prior = self.banks.transitions(parents, Groups(node - level.start, len(level)), plan.ids(level))
            merged = precision_weighted_merge(*hat.chunk(2, 1), *prior.chunk(2, 1))
            samples.append(reparameterize(*merged, own_noise))
            posteriors.append(torch.cat(merged, 1))
            priors.append(prior)
        z = torch.cat(samples)
        prior_logits = visits.logits
        if plan.routed:
            prior_logits = self.banks.prior_routers(
                z.index_select(0, visits.routed), visits.routed_groups(), plan.ids(plan.routed)
            )
        return TreePosterior(visits, z, torch.cat(posteriors), torch.cat(priors), prior_logits)

    # --- reading the posterior ----------------------------------------------------------------------------

    def elbo(
        self,
        x: Tensor,
        *,
        threshold: float = 0.0,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ELBO:
        """Return the evidence lower bound of each image, term by term.

        `ELBO = E_q[ log p(x | z_leaf) ] - KL_root - KL_nodes - KL_decisions`, one sample of the latents, KLs analytic
        (TreeVAE, arXiv 2306.08984, eq. 9). A `threshold` above 0 leaves out visits of small probability, which makes
        training fast and the value slightly too high: report values with 0.
        """
        posterior = self.posterior(x, threshold=threshold, noise=noise, generator=generator)
        return posterior.bound(self.leaf_log_likelihood(posterior, x))

    def leaf_log_likelihood(self, posterior: TreePosterior, x: Tensor) -> Tensor:
        """Return `log p(x | z_leaf)` in nats, `(L,)` at the posterior's visits to leaves."""
        leaves = posterior.visits.at_leaves()
        output = self.decode_visits(posterior, leaves)
        return self.likelihood.log_prob(output, x.index_select(0, posterior.visits.image[leaves]))

    def iwae(
        self, x: Tensor, samples: int = 64, *, generator: torch.Generator | None = None, chunk: int = 64
    ) -> Tensor:
        """Compute the importance-weighted bound on `log p(x)`, `(B,)` in nats; tighter with more samples.

        `log 1/k sum_k w_k`, `w = p(x | z_leaf) prod p(z_i | z_parent) p(c_i | z_i) / prod q(z_i | .) q(c_i | x)` with a
        path and its latents drawn from the posterior (Burda et al., arXiv 1509.00519). Unlike an average of ELBOs with
        analytic KLs, this bound never exceeds the evidence in expectation.

        Args:
            x: `(B, *inputs)`.
            samples: importance samples per image, `k`.
            generator: source of the random numbers.
            chunk: samples in memory at a time.

        Raises:
            TypeError: if `samples` or `chunk` is no integer, or `x` has the wrong dtype.
            ValueError: if `samples` or `chunk` is below 1, or `check` refuses `x`.
        """
        self.check(x)
        if not (isinstance(samples, Integral) and isinstance(chunk, Integral)):
            raise TypeError(f"samples and chunk must be integers, found {samples!r} and {chunk!r}")
        if samples < 1 or chunk < 1:
            raise ValueError(f"samples and chunk must be at least 1, found {samples} and {chunk}")
        features = self.features(x)
        everyone = self.route(features)  # once: a decision is the same for every sample
        log_probs = leaf_log_probs_of(everyone)
        total = x.new_full((len(x),), -math.inf)
        for start in range(0, samples, chunk):
            k = min(chunk, samples - start)
            uniform = torch.rand(len(x) * k, generator=generator, dtype=x.dtype, device=x.device)
            leaf = sample_leaf(log_probs.repeat_interleave(k, 0), uniform)
            visits = everyone.repeated(k).along(leaf)
            posterior = self.latents(features.repeat_interleave(k, 1), visits, generator=generator)
            likelihood = self.leaf_log_likelihood(posterior, x.repeat_interleave(k, 0))
            total = torch.logaddexp(total, posterior.log_weights(likelihood, leaf).view(len(x), k).logsumexp(1))
        return total - math.log(samples)

    def leaf_log_probs(self, x: Tensor, *, threshold: float = 0.0) -> Tensor:
        """Return `log P(leaf | x)` in nats, `(B, K)` in the order of `topology.leaves`; only routers run."""
        self.check(x)
        return leaf_log_probs_of(self.route(self.features(x), threshold=threshold))

    @torch.no_grad()
    def cluster(self, x: Tensor) -> Tensor:
        """Return the id of each image's most probable leaf, `(B,)`, without gradients and in eval mode."""
        with evaluating(self):
            best = self.leaf_log_probs(x).argmax(1)
        return torch.tensor(self.topology.leaves, device=best.device)[best]

    def reconstruct(
        self, x: Tensor, *, leaf: Tensor | int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Reconstruct `x` by a leaf's decoder: `(B, *inputs)`. One path and one decoder run per image.

        Args:
            x: `(B, *inputs)`.
            leaf: leaf id, one for all or `(B,)`; each image's most probable leaf by default.
            generator: source of the latents' noise.

        Raises:
            KeyError: if an id is not the id of a leaf.
            TypeError: if ids are not integers.
            ValueError: if there is not one id for each image.
        """
        self.check(x)
        if leaf is None:
            visits = self.route(features := self.features(x))
            best = leaf_log_probs_of(visits).argmax(1)
            posterior = self.latents(features, visits.along(best), generator=generator)
        else:
            chosen = torch.as_tensor(leaf, device=x.device)
            posterior = self.posterior(x, leaf=chosen if chosen.ndim else chosen.expand(len(x)), generator=generator)
        return self.images_of(posterior)

    def images_of(self, posterior: TreePosterior) -> Tensor:
        """Decode a posterior in which each image has one leaf: `(B, *inputs)`."""
        leaves = posterior.visits.at_leaves()
        images = self.likelihood.mean(self.decode_visits(posterior, leaves))
        return torch.empty_like(images).index_copy(0, posterior.visits.image[leaves], images)

    def decode_visits(self, posterior: TreePosterior, leaves: Tensor) -> Tensor:
        """Return the decoders' raw output at some leaf visits: `(L, *inputs)`."""
        visits, plan = posterior.visits, posterior.visits.plan
        groups = Groups(plan.leaf_rank[visits.node[leaves]], len(plan.leaves))
        return self.banks.decoders(posterior.z.index_select(0, leaves), groups, plan.ids(plan.leaves))

    # --- generating ---------------------------------------------------------------------------------------

    def sample(
        self,
        n: int,
        *,
        node: int | None = None,
        temperature: float = 1.0,
        first_index: int = 0,
        generator: torch.Generator | None = None,
    ) -> TreeSample:
        """Draw images from the prior, through any node of the tree.

        A root latent is drawn and propagated down the tree. Above `node` the path is given; at `node` and below it the
        prior routers choose. One path and one decoder run per image. Image `i` depends on the generator's seed and on
        `first_index + i` only, never on the rest of the batch. Images are drawn in eval mode.

        Args:
            n: number of images.
            node: id of a node that every path passes; the root by default, a leaf to choose the cluster.
            temperature: factor on the standard deviation of every latent; below 1 is closer to the typical image.
            first_index: index of the first image, to continue a series.
            generator: source of the seed.

        Raises:
            KeyError: if there is no such node.
            TypeError: if `n` or `first_index` is no integer, or the temperature no number.
            ValueError: if `n` or the temperature is negative.
        """
        with evaluating(self):
            return sample(
                self.banks,
                self.likelihood,
                self.latent,
                n,
                node=node,
                temperature=temperature,
                first_index=first_index,
                generator=generator,
            )

    def sample_leaves(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        first_index: int = 0,
        generator: torch.Generator | None = None,
    ) -> LeafSamples:
        """Draw `n` roots and follow each root to every leaf, for one image per cluster from the same root latent.

        Column `k` holds the images that `sample(n, node=topology.leaves[k])` returns for the same generator state.
        """
        with evaluating(self):
            return sample_leaves(
                self.banks,
                self.likelihood,
                self.latent,
                n,
                temperature=temperature,
                first_index=first_index,
                generator=generator,
            )

    # --- checks -------------------------------------------------------------------------------------------

    def check(self, x: Tensor) -> None:
        """Raise unless `x` fits the model; values are read on a CPU only.

        Raises:
            TypeError: if `x` is no tensor, not floating point, or of another dtype than the weights (which autocast
                allows).
            ValueError: if `x` has another shape, is not finite, or leaves the range of the data.
        """
        check_batch(x, self.inputs, self.dtype, self.likelihood.data_range, "observations")

    def rows(self, data: Indexable) -> Rows:
        """Return a data set as rows for the model, which are read a batch at a time; see `Rows`.

        A floating-point tensor is checked as a whole, of other data the first row; check what is read later.

        Raises:
            TypeError: if the data are no rows of numbers, or a tensor of another dtype than the weights.
            ValueError: if there is no row, or rows do not fit the model; as `check`.
        """
        if isinstance(data, Tensor) and data.is_floating_point():
            self.check(data)
            return Rows.of(data, dtype=self.dtype)
        rows = Rows.of(data, dtype=self.dtype)
        self.check(rows[:1].to(self.device))
        return rows
