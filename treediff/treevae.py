"""TreeVAE: a variational autoencoder whose latents form a tree (Manduchi et al., arXiv 2306.08984).

Generative model: `z_0 ~ N(0, I)`; at every node with two children a router decides `c_i ~ Bernoulli(r_p(z_i))`, left or
right; a child's latent is `z_i ~ N(mu_p(z_parent), sigma_p^2(z_parent))`; the leaf's decoder gives `p(x | z_leaf)`.

Inference: an encoder and a ladder of bottom-up blocks give features `d_h` for each depth `h`. Posterior routers read
`d_h`, and each node's Gaussian head reads `d_h` and is merged with the prior from the sampled parent by precision.

Letters: `B` batch, `C H W` image, `N` nodes, `I` routed nodes, `K` leaves, `D` latent width, `T` visits.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treediff.generation import LeafSamples, TreeSample, sample, sample_leaves
from treediff.io import load_into, read_header, save_model
from treediff.layers.bank import NodeBank
from treediff.layers.grouped import Groups
from treediff.layers.likelihood import Likelihood
from treediff.presets import image_parts, vector_parts
from treediff.posterior import ELBO, TreePosterior, leaf_log_probs_of
from treediff.probability import precision_weighted_merge, reparameterize, sample_leaf
from treediff.topology import TreeTopology
from treediff.visits import TreePlan, Visits, descend

__all__ = ["TreeVAE"]


class TreeVAE(nn.Module):
    """A tree of latent variables with one decoder per leaf.

    Built from parts; `TreeVAE.for_images` and `TreeVAE.for_vectors` choose good ones. Every per-node part is a
    template of which each node gets its own copy, see `NodeBank`.

    Args:
        topology: the tree to start with.
        encoder: observations to the features of the deepest level.
        bottom_up: blocks that lead up the ladder; `len(bottom_up)` is the greatest depth the tree may have.
        head: a node's Gaussian from features: `(B, ...)` to `(B, 2D, ...)`.
        transition: a child's prior from the parent's latent: `(B, D, ...)` to `(B, 2D, ...)`.
        posterior_router: features to the logit of going left, `(B,)`.
        prior_router: latent to the logit of going left, `(B,)`.
        decoder: a leaf's latent to the raw output that the likelihood reads.
        likelihood: how outputs and observations compare.
        latent: shape of one latent, `(D,)` or `(D, h, w)`.
        inputs: shape of one observation.
        generator: where initial weights of the node networks come from.
        device: where the node networks live; where the templates are, by default.
        dtype: what the node networks are stored as.

    Raises:
        ValueError: if the tree is deeper than the ladder, or a template keeps buffers.
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
        self.latent = tuple(latent)
        self.inputs = tuple(inputs)
        self.encoder = encoder
        self.bottom_up = nn.ModuleList(bottom_up)
        self.heads = NodeBank(head, device=device, dtype=dtype)
        self.transitions = NodeBank(transition, device=device, dtype=dtype)
        self.posterior_routers = NodeBank(posterior_router, device=device, dtype=dtype)
        self.prior_routers = NodeBank(prior_router, device=device, dtype=dtype)
        self.decoders = NodeBank(decoder, device=device, dtype=dtype)
        self.likelihood = likelihood
        self.config: dict[str, Any] | None = None
        self._plans: dict[tuple[int, ...], TreePlan] = {}
        self.topology = topology
        self._require_depth(topology)
        self._grow_banks(generator)

    @classmethod
    def for_images(
        cls,
        *,
        size: int | tuple[int, int],
        channels: int = 1,
        latent: int | tuple[int, ...] = 8,
        width: int = 128,
        max_depth: int = 6,
        network: str = "conv",
        likelihood: str = "bernoulli",
        topology: TreeTopology | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TreeVAE:
        """A model for images in [0, 1] with parts chosen for you.

        Args:
            size: height and width, or one number for both.
            channels: 1 for grey, 3 for colour.
            latent: width of a latent vector, or `(channels, h, w)` for latents that are maps.
            width: width of features and hidden layers.
            max_depth: greatest depth the tree may grow to.
            network: 'conv' for small images, 'mlp' for tiny ones, 'residual' for colour.
            likelihood: 'bernoulli', 'gaussian' (variance 1/2) or 'gaussian_learned'.
            topology: the tree to start with; a lone root by default, which growth splits.
            generator: where initial weights come from; PyTorch's default generator if not given.
            device: where the model lives.
            dtype: what weights are stored as.

        Examples:
            >>> model = TreeVAE.for_images(size=28, topology=TreeTopology.balanced(1))
            >>> model.elbo(torch.rand(4, 1, 28, 28)).elbo.shape
            torch.Size([4])
        """
        height, breadth = (size, size) if isinstance(size, int) else size
        config = {
            "size": [height, breadth],
            "channels": channels,
            "latent": [latent] if isinstance(latent, int) else list(latent),
            "width": width,
            "max_depth": max_depth,
            "network": network,
            "likelihood": likelihood,
        }
        settings = {**config, "size": (height, breadth), "latent": tuple(config["latent"])}
        parts = image_parts(**settings, generator=generator, device=device, dtype=dtype)
        model = cls(topology=topology or TreeTopology.balanced(0), **parts)
        model.config = {"for_images": config}
        return model

    @classmethod
    def for_vectors(
        cls,
        features: int,
        *,
        latent: int = 8,
        width: int = 128,
        max_depth: int = 6,
        likelihood: str = "gaussian_learned",
        topology: TreeTopology | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TreeVAE:
        """A model for vectors of `features` numbers: tables, text features; other arguments as for `for_images`.

        Examples:
            >>> model = TreeVAE.for_vectors(5)
            >>> model.cluster(torch.randn(3, 5))
            tensor([0, 0, 0])
        """
        config = {
            "features": features,
            "latent": latent,
            "width": width,
            "max_depth": max_depth,
            "likelihood": likelihood,
        }
        settings = {**config, "latent": (latent,)}
        parts = vector_parts(**settings, generator=generator, device=device, dtype=dtype)
        model = cls(topology=topology or TreeTopology.balanced(0), **parts)
        model.config = {"for_vectors": config}
        return model

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TreeVAE:
        """The untrained model that `model.config` describes; global random state is left alone."""
        ((factory, arguments),) = config.items()
        if factory not in ("for_images", "for_vectors"):
            raise ValueError(f"expected a configuration for for_images or for_vectors, found {factory!r}")
        fixed = {key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()}
        model: TreeVAE = getattr(cls, factory)(**fixed, generator=torch.Generator().manual_seed(0))
        return model

    # --- one traversal ------------------------------------------------------------------------------------

    def features(self, x: Tensor) -> list[Tensor]:
        """The bottom-up ladder: features `d_h` for the depths 0 (root) to `len(bottom_up)`."""
        ladder = [self.encoder(x)]
        for block in self.bottom_up:
            ladder.append(block(ladder[-1]))
        return ladder[::-1]

    def route(
        self, features: Sequence[Tensor], *, nodes: Sequence[int] | None = None, threshold: float = 0.0
    ) -> Visits:
        """Follow the posterior routers down the tree; nothing but routers runs."""

        def logits(depth: int, image: Tensor, groups: Groups, ids: list[int]) -> Tensor:
            return self.posterior_routers(features[depth].index_select(0, image), groups, ids)

        plan = self.plan(nodes, features[0].device)
        return descend(plan, len(features[0]), logits, threshold=threshold, like=features[0])

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
        """Everything the model believes about `x`, in one pass from the root to the leaves.

        Args:
            x: `(B, *inputs)`, in the range of the likelihood.
            nodes: ids to visit, closed under taking parents; all by default.
            leaf: `(B,)` leaf ids; each image then visits the path to its own leaf and nothing else.
            threshold: nodes that an image reaches with less probability than this are not visited. 0 is exact.
            noise: `(B, N, *latent)` standard normal, one per image and node of `topology.ids`; drawn if not given.
            generator: where noise comes from.

        Returns:
            the structured result that bounds, clusters and reconstructions are read from.

        Raises:
            ValueError: if `x` has another shape, is not finite, or leaves the range of the data.
        """
        self._check(x)
        features = self.features(x)
        visits = self.route(features, nodes=nodes, threshold=threshold)
        if leaf is not None:
            visits = visits.along(self._leaf_ranks(leaf))
        return self._posterior(features, visits, noise, generator)

    def _posterior(
        self,
        features: Sequence[Tensor],
        visits: Visits,
        noise: Tensor | None,
        generator: torch.Generator | None,
    ) -> TreePosterior:
        ladder = torch.stack(list(features[: len(visits.plan.levels)]))
        rows = ladder[_depths(visits), visits.image]
        mean_hat, logvar_hat = self.heads(rows, visits.groups(), visits.plan.nodes).chunk(2, 1)
        if noise is None:
            noise = torch.randn(mean_hat.shape, generator=generator, dtype=rows.dtype, device=rows.device)
        else:
            order = torch.tensor([self.topology.index[n] for n in visits.plan.nodes], device=rows.device)
            noise = noise[visits.image, order[visits.node]]
        return self._top_down(visits, mean_hat, logvar_hat, noise)

    def _top_down(self, visits: Visits, mean_hat: Tensor, logvar_hat: Tensor, noise: Tensor) -> TreePosterior:
        """Priors from sampled parents, merged with what the heads say, level by level."""
        plan, first = visits.plan, slice(0, visits.starts[1])
        zeros = torch.zeros_like(mean_hat[first])
        levels = [(mean_hat[first], logvar_hat[first], zeros, zeros)]
        samples = [reparameterize(mean_hat[first], logvar_hat[first], noise[first])]
        for depth, level in enumerate(plan.levels[1:], start=1):
            here = slice(visits.starts[depth], visits.starts[depth + 1])
            parents = samples[-1].index_select(0, visits.parent[here] - visits.starts[depth - 1])
            groups = Groups(visits.node[here] - level.start, len(level))
            prior_mean, prior_logvar = self.transitions(parents, groups, plan.ids(level)).chunk(2, 1)
            mean, logvar = precision_weighted_merge(mean_hat[here], logvar_hat[here], prior_mean, prior_logvar)
            levels.append((mean, logvar, prior_mean, prior_logvar))
            samples.append(reparameterize(mean, logvar, noise[here]))
        z = torch.cat(samples)
        mean, logvar, prior_mean, prior_logvar = (torch.cat(part) for part in zip(*levels, strict=True))
        prior_logits = visits.logits
        if plan.routed:
            prior_logits = self.prior_routers(
                z.index_select(0, visits.routed), visits.routed_groups(), plan.ids(plan.routed)
            )
        return TreePosterior(visits, z, mean, logvar, prior_mean, prior_logvar, prior_logits)

    # --- reading the posterior ----------------------------------------------------------------------------

    def elbo(
        self,
        x: Tensor,
        *,
        threshold: float = 0.0,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ELBO:
        """The evidence lower bound of each image, term by term.

        `ELBO = E_q[ log p(x | z_leaf) ] - KL_root - KL_nodes - KL_decisions`, one sample of the latents, KLs analytic
        (TreeVAE, arXiv 2306.08984, eq. 9). A `threshold` above 0 leaves out what is hardly reached, which makes
        training fast and the value slightly too high: report values with 0.
        """
        posterior = self.posterior(x, threshold=threshold, noise=noise, generator=generator)
        return self.elbo_of(posterior, x)

    def elbo_of(self, posterior: TreePosterior, x: Tensor, *, from_depth: int | None = None) -> ELBO:
        """The bound from a posterior that was already found for `x`.

        With `from_depth` only decisions at that depth or below count, and KLs of nodes below it: the part of the bound
        that a split at that depth takes part in.
        """
        visits, root = posterior.visits, posterior.visits.batch
        reach = visits.log_reach.exp()
        nodes = reach * posterior.kl_nodes()
        decisions = reach[visits.routed] * posterior.kl_decisions()
        leaves = visits.at_leaves()
        log_prob = self.leaf_log_likelihood(posterior, x, leaves)
        kl_root, first = nodes[:root], root
        if from_depth is not None:
            first = visits.starts[from_depth + 1]
            decisions = decisions * (visits.routed >= visits.starts[from_depth])
            kl_root = torch.zeros_like(kl_root)
        return ELBO(
            reconstruction=visits.per_image(-reach[leaves] * log_prob, leaves),
            kl_root=kl_root,
            kl_nodes=visits.per_image(nodes[first:], _after(visits, first)),
            kl_decisions=visits.per_image(decisions, visits.routed),
        )

    def leaf_log_likelihood(self, posterior: TreePosterior, x: Tensor, leaves: Tensor) -> Tensor:
        """`log p(x | z_leaf)` in nats at some leaf visits `(L,)`."""
        output = self.decode_visits(posterior, leaves)
        return self.likelihood.log_prob(output, x.index_select(0, posterior.visits.image[leaves]))

    def decode_visits(self, posterior: TreePosterior, leaves: Tensor) -> Tensor:
        """The decoders' raw output at some leaf visits: `(L, *inputs)`."""
        visits, plan = posterior.visits, posterior.visits.plan
        groups = Groups(plan.leaf_rank[visits.node[leaves]], len(plan.leaves))
        return self.decoders(posterior.z.index_select(0, leaves), groups, plan.ids(plan.leaves))

    def leaf_log_probs(self, x: Tensor, *, threshold: float = 0.0) -> Tensor:
        """`log P(leaf | x)` in nats, `(B, K)` in the order of `topology.leaves`; only routers run."""
        self._check(x)
        return leaf_log_probs_of(self.route(self.features(x), threshold=threshold))

    def cluster(self, x: Tensor) -> Tensor:
        """The id of each image's most probable leaf, `(B,)`."""
        leaves = torch.tensor(self.topology.leaves, device=x.device)
        return leaves[self.leaf_log_probs(x).argmax(1)]

    def reconstruct(
        self, x: Tensor, *, leaf: Tensor | int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """What a leaf's decoder makes of `x`: `(B, *inputs)`. One path and one decoder run per image.

        Args:
            x: `(B, *inputs)`.
            leaf: leaf id, one for all or `(B,)`; each image's most probable leaf by default.
            generator: where the noise of the latents comes from.

        Raises:
            KeyError: if an id is not that of a leaf.
        """
        chosen = self.cluster(x) if leaf is None else torch.as_tensor(leaf, device=x.device).expand(len(x))
        posterior = self.posterior(x, leaf=chosen, generator=generator)
        visits = posterior.visits
        leaves = visits.at_leaves()
        images = self.likelihood.mean(self.decode_visits(posterior, leaves))
        return torch.empty_like(images).index_copy(0, visits.image[leaves], images)

    def iwae(
        self, x: Tensor, samples: int = 64, *, generator: torch.Generator | None = None, chunk: int = 64
    ) -> Tensor:
        """The importance-weighted bound on `log p(x)`, `(B,)` in nats; tighter with more samples.

        `log 1/k sum_k w_k`, `w = p(x | z_leaf) prod p(z_i | z_parent) p(c_i | z_i) / prod q(z_i | .) q(c_i | x)` with a
        path and its latents drawn from the posterior (Burda et al., arXiv 1509.00519). Unlike an average of ELBOs with
        analytic KLs it never exceeds the evidence in expectation.

        Args:
            x: `(B, *inputs)`.
            samples: importance samples per image, `k`.
            generator: where the randomness comes from.
            chunk: samples in memory at a time.
        """
        if samples < 1 or chunk < 1:
            raise ValueError(f"samples and chunk must be at least 1, found {samples} and {chunk}")
        self._check(x)
        features = self.features(x)
        total = x.new_full((len(x),), -math.inf)
        for start in range(0, samples, chunk):
            k = min(chunk, samples - start)
            repeated = [d.repeat_interleave(k, 0) for d in features]
            weights = self._log_weights(repeated, x.repeat_interleave(k, 0), generator).view(len(x), k)
            total = torch.logaddexp(total, weights.logsumexp(1))
        return total - math.log(samples)

    def _log_weights(self, features: list[Tensor], x: Tensor, generator: torch.Generator | None) -> Tensor:
        """`(B,)` log importance weights of one path and one set of latents per row."""
        everyone = self.route(features)
        uniform = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device)
        leaf = sample_leaf(leaf_log_probs_of(everyone), uniform)
        visits = everyone.along(leaf)
        posterior = self._posterior(features, visits, None, generator)
        sign = torch.where(visits.turns_left(leaf), 1.0, -1.0).to(x.dtype)
        decisions = F.logsigmoid(sign * posterior.prior_logits) - F.logsigmoid(sign * visits.logits)
        leaves = visits.at_leaves()
        return (
            visits.per_image(posterior.log_ratio_nodes())
            + visits.per_image(decisions, visits.routed)
            + visits.per_image(self.leaf_log_likelihood(posterior, x, leaves), leaves)
        )

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

        A root latent is drawn and handed down. Above `node` the way is given; at `node` and below it the prior routers
        choose. One path and one decoder run per image. Image `i` depends on the generator's seed and on
        `first_index + i` only, never on the rest of the batch.

        Args:
            n: how many.
            node: id of a node that every path passes; the root by default, a leaf to choose the cluster.
            temperature: factor on the standard deviation of every latent; below 1 is closer to the typical image.
            first_index: index of the first image, to continue a series.
            generator: gives the seed.

        Raises:
            KeyError: if there is no such node.
            ValueError: if `n` or the temperature is negative.
        """
        return sample(
            self, n, node=node, temperature=temperature, first_index=first_index, generator=generator
        )

    def sample_leaves(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        first_index: int = 0,
        generator: torch.Generator | None = None,
    ) -> LeafSamples:
        """Draw `n` roots and follow each to every leaf, for the same thing seen by every cluster.

        Column `k` holds the pictures that `sample(n, node=topology.leaves[k])` gives for the same generator state.
        """
        return sample_leaves(
            self, n, temperature=temperature, first_index=first_index, generator=generator
        )

    # --- the tree changes ---------------------------------------------------------------------------------

    def split(
        self, leaf: int, *, warm_start: bool = False, generator: torch.Generator | None = None
    ) -> tuple[int, int]:
        """Turn a leaf into a parent of two new leaves, whose ids are returned.

        The leaf's decoder goes; with `warm_start` the children begin with copies of it, and of its head and
        transition, else with fresh weights. No other node is touched.

        Raises:
            KeyError: if there is no such node.
            ValueError: if it is not a leaf, or lies at the greatest depth.
        """
        topology = self.topology.split(leaf)
        self._require_depth(topology)
        children = topology.children(leaf)
        self.topology = topology
        for child in children:
            self.heads.add(child, like=leaf if warm_start else None, generator=generator)
            self.decoders.add(child, like=leaf if warm_start else None, generator=generator)
            self.transitions.add(child, generator=generator)
        self._grow_banks(generator)
        left, right = children
        return left, right

    def prune(self, leaf: int) -> None:
        """Remove a leaf, and ancestors left without children; a parent with one child left decides nothing any more.

        Probability that went to the leaf goes to its sibling.

        Raises:
            KeyError: if there is no such node.
            ValueError: if it is not a leaf, or the only one.
        """
        self.topology = self.topology.prune(leaf)
        self._grow_banks(None)

    def _grow_banks(self, generator: torch.Generator | None) -> None:
        """Give each bank exactly the nodes that the tree asks of it."""
        tree = self.topology
        for bank, nodes in (
            (self.heads, tree.ids),
            (self.transitions, tree.ids[1:]),
            (self.posterior_routers, tree.routed),
            (self.prior_routers, tree.routed),
            (self.decoders, tree.leaves),
        ):
            for node in set(bank.nodes) - set(nodes):
                bank.remove(node)
            for node in nodes:
                if node not in bank.nodes:
                    bank.add(node, generator=generator)
        self._plans.clear()

    def plan(self, nodes: Sequence[int] | None, device: torch.device) -> TreePlan:
        """The layout of a traversal of `nodes`, kept until the tree changes."""
        key = self.topology.ids if nodes is None else tuple(nodes)
        found = self._plans.get(key)
        if found is None or found.device != device:
            found = self._plans[key] = TreePlan(self.topology, nodes, device=device)
        return found

    # --- files --------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, tree and configuration to one safetensors file; see `treediff.io`."""
        save_model(self, path, {"config": self.config, "topology": json.loads(self.topology.to_json())})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, model: TreeVAE | None = None) -> TreeVAE:
        """Read what `save` wrote; every tensor is bit-equal.

        Args:
            path: the file.
            model: a model to fill, for one built from parts of your own; its tree is replaced by the file's.

        Raises:
            ValueError: if the file is damaged, foreign, of another version, or does not fit; or if it was saved from a
                model built from parts and none is given.
        """
        header = read_header(path, cls.__name__)
        topology = TreeTopology.from_json(json.dumps(header.get("topology")))
        if model is None:
            if header.get("config") is None:
                raise ValueError(
                    f"the model in {os.fspath(path)!r} was built from parts, which a file does not hold; build it "
                    "the same way and pass it as model="
                )
            model = cls.from_config(header["config"])
        model.topology = topology
        model._require_depth(topology)
        model._grow_banks(None)
        load_into(model, path)
        return model

    # --- checks -------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored as."""
        return next(self.parameters()).dtype

    def extra_repr(self) -> str:
        """The tree and the shapes."""
        return f"topology={self.topology}, inputs={self.inputs}, latent={self.latent}"

    def _leaf_ranks(self, leaf: Tensor) -> Tensor:
        """Node ids of leaves to ranks among the leaves."""
        leaves = torch.tensor(self.topology.leaves, device=leaf.device)
        matches = leaf[:, None] == leaves
        if not bool(matches.any(1).all()):
            wrong = leaf[~matches.any(1)][0].item()
            raise KeyError(f"node {wrong} is not a leaf of the tree; the leaves are {list(self.topology.leaves)}")
        return matches.to(torch.int64).argmax(1)

    def _require_depth(self, topology: TreeTopology) -> None:
        if topology.max_depth > len(self.bottom_up):
            raise ValueError(
                f"a tree of depth {topology.max_depth} needs as many bottom-up blocks, this model has "
                f"{len(self.bottom_up)}; build it with a greater max_depth"
            )

    def _check(self, x: Tensor) -> None:
        if x.ndim != len(self.inputs) + 1 or tuple(x.shape[1:]) != self.inputs:
            shape = ", ".join(str(n) for n in self.inputs)
            raise ValueError(f"expected observations of shape (batch, {shape}), found {tuple(x.shape)}")
        # Looking at values would stop an accelerator's stream, and a compiled graph, at every step.
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            check_values(x, self.likelihood.data_range)


def check_values(x: Tensor, data_range: tuple[float, float] | None) -> None:
    """Raise ValueError unless every value is finite and inside the range."""
    if not x.numel():
        return
    low, high = (float(v) for v in x.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("observations must be finite, found NaN or infinity; clean or mask the data first")
    if data_range is not None and (low < data_range[0] or high > data_range[1]):
        raise ValueError(
            f"observations must lie in {list(data_range)}, found values from {low:.4g} to {high:.4g}; divide 8-bit "
            "images by 255, or choose a likelihood for other data"
        )


def _depths(visits: Visits) -> Tensor:
    sizes = torch.tensor([b - a for a, b in zip(visits.starts, visits.starts[1:], strict=False)])
    return torch.repeat_interleave(sizes, output_size=visits.starts[-1]).to(visits.image.device)


def _after(visits: Visits, first: int) -> Tensor:
    return torch.arange(first, visits.starts[-1], device=visits.image.device)
