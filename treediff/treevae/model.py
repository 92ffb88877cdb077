"""TreeVAE: a variational autoencoder whose latents form a tree (Manduchi et al., arXiv 2306.08984).

Generative model: `z_0 ~ N(0, I)`; at every node with two children a router decides `c_i ~ Bernoulli(r_p(z_i))`, left or
right; a child's latent is `z_i ~ N(mu_p(z_parent), sigma_p^2(z_parent))`; the leaf's decoder gives `p(x | z_leaf)`.

Inference: an encoder and a ladder of bottom-up blocks give features `d_h` for each depth `h`. Posterior routers read
`d_h`, and each node's Gaussian head reads `d_h` and is merged with the prior from the sampled parent by precision.

Letters: `B` batch, `C H W` image, `N` nodes, `I` routed nodes, `K` leaves, `D` latent width, `T` visits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from treediff.core.groups import Groups
from treediff.core.modes import evaluating
from treediff.layers.grouped._gaussians import merge_and_sample
from treediff.tree.probability import reparameterize
from treediff.tree.visits import Visits, descend
from treediff.treevae.posterior import ELBO, TreePosterior, elbo_of, iwae, leaf_log_probs_of
from treediff.treevae.presets import PresetNetworks
from treediff.treevae.prior import LeafSamples, TreeSample, sample, sample_leaves

__all__ = ["TreeVAE"]


class TreeVAE(PresetNetworks):
    """A tree of latent variables with one decoder per leaf.

    Built from parts (see `TreeNetworks` for what they are); `TreeVAE.for_images` and `TreeVAE.for_vectors` choose good
    ones. A lone root is a plain VAE, a chain a LadderVAE (arXiv 1602.02282).

    Examples:
        >>> from treediff import TreeTopology
        >>> model = TreeVAE.for_images(size=8, topology=TreeTopology.balanced(1))
        >>> model.cluster(torch.rand(3, 1, 8, 8)).shape
        torch.Size([3])
    """

    # --- one traversal ------------------------------------------------------------------------------------

    def features(self, x: Tensor) -> Tensor:
        """The bottom-up ladder: features `d_h` for the depths 0 (root) to `len(bottom_up)`, `(depths, B, ...)`."""
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
        """Follow the posterior routers down the tree; nothing but routers runs. Arguments as for `visits.descend`."""
        batch, rows = features.shape[1], features.flatten(0, 1)
        plan = self.plan(nodes, features.device)

        def logits(image: Tensor, node: Tensor, groups: Groups, ids: list[int]) -> Tensor:
            return self.posterior_routers(rows.index_select(0, plan.ladder_rows(image, node, batch)), groups, ids)

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
            TypeError: if `x`, `leaf` or `noise` has the wrong dtype.
            KeyError: if an id in `nodes` is unknown, or one in `leaf` is not that of a leaf to visit.
            ValueError: if `x` has another shape, is not finite, or leaves the range of the data; if `leaf` or `noise`
                has another shape, `nodes` lacks a parent, or the threshold is no probability below 1.
        """
        self.check(x)
        features, plan = self.features(x), self.plan(nodes, x.device)
        ranks = None if leaf is None else self._leaf_ranks(leaf, len(x), plan.ids(plan.leaves))
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
        """The second half of `posterior`: Gaussians, samples and prior decisions for visits already found.

        Noise is that of every image and node, `(B, N, *latent)`, or of the visits alone, `(T, *latent)`. Images of
        `from_prior`, `(B,)` booleans, are seen at the root only; below it their latents follow the prior.
        """
        where = visits.plan.ladder_rows(visits.image, visits.node, visits.batch)
        rows = features.flatten(0, 1).index_select(0, where)
        hats = self.heads(rows, visits.groups(), visits.plan.nodes)
        if from_prior is not None:
            # A head that knows nothing leaves all to the prior it is merged with, exactly.
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
        """Priors from sampled parents, merged with what the heads say, level by level."""
        plan, sizes = visits.plan, [stop - start for start, stop in pairwise(visits.starts)]
        columns = (hats, noise, visits.node, visits.parent)
        (hat, own_noise, _, _), *below = zip(*(column.split(sizes) for column in columns), strict=True)
        mean, logvar = hat.chunk(2, 1)
        samples, posteriors, priors = [reparameterize(mean, logvar, own_noise)], [hat], [torch.zeros_like(hat)]
        for level, start, (hat, own_noise, node, parent) in zip(plan.levels[1:], visits.starts, below, strict=False):
            parents = samples[-1].index_select(0, parent - start)
            prior = self.transitions(parents, Groups(node - level.start, len(level)), plan.ids(level))
            z, posterior = merge_and_sample(hat, prior, own_noise)
            samples.append(z)
            posteriors.append(posterior)
            priors.append(prior)
        z = torch.cat(samples)
        prior_logits = visits.logits
        if plan.routed:
            prior_logits = self.prior_routers(
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
        """The evidence lower bound of each image, term by term.

        `ELBO = E_q[ log p(x | z_leaf) ] - KL_root - KL_nodes - KL_decisions`, one sample of the latents, KLs analytic
        (TreeVAE, arXiv 2306.08984, eq. 9). A `threshold` above 0 leaves out what is hardly reached, which makes
        training fast and the value slightly too high: report values with 0.
        """
        posterior = self.posterior(x, threshold=threshold, noise=noise, generator=generator)
        return elbo_of(self, posterior, x)

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

        Raises:
            TypeError: if `samples` or `chunk` is no integer, or `x` has the wrong dtype.
            ValueError: if `samples` or `chunk` is below 1, or `x` is not what the model takes.
        """
        self.check(x)
        return iwae(self, x, samples, chunk=chunk, generator=generator)

    def leaf_log_probs(self, x: Tensor, *, threshold: float = 0.0) -> Tensor:
        """`log P(leaf | x)` in nats, `(B, K)` in the order of `topology.leaves`; only routers run."""
        self.check(x)
        return leaf_log_probs_of(self.route(self.features(x), threshold=threshold))

    @torch.no_grad()
    def cluster(self, x: Tensor) -> Tensor:
        """The id of each image's most probable leaf, `(B,)`, without gradients and in eval mode."""
        with evaluating(self):
            best = self.leaf_log_probs(x).argmax(1)
        return torch.tensor(self.topology.leaves, device=best.device)[best]

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
        """`(B, *inputs)`, what the decoders make of a posterior in which each image has one leaf."""
        leaves = posterior.visits.at_leaves()
        images = self.likelihood.mean(self.decode_visits(posterior, leaves))
        return torch.empty_like(images).index_copy(0, posterior.visits.image[leaves], images)

    def decode_visits(self, posterior: TreePosterior, leaves: Tensor) -> Tensor:
        """The decoders' raw output at some leaf visits: `(L, *inputs)`."""
        visits, plan = posterior.visits, posterior.visits.plan
        groups = Groups(plan.leaf_rank[visits.node[leaves]], len(plan.leaves))
        return self.decoders(posterior.z.index_select(0, leaves), groups, plan.ids(plan.leaves))

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
        `first_index + i` only, never on the rest of the batch. It is drawn in eval mode.

        Args:
            n: how many.
            node: id of a node that every path passes; the root by default, a leaf to choose the cluster.
            temperature: factor on the standard deviation of every latent; below 1 is closer to the typical image.
            first_index: index of the first image, to continue a series.
            generator: gives the seed.

        Raises:
            KeyError: if there is no such node.
            TypeError: if `n` or `first_index` is no integer, or the temperature no number.
            ValueError: if `n` or the temperature is negative.
        """
        with evaluating(self):
            return sample(self, n, node=node, temperature=temperature, first_index=first_index, generator=generator)

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
        with evaluating(self):
            return sample_leaves(self, n, temperature=temperature, first_index=first_index, generator=generator)
