"""Diffusion models in parts: schedules, predictions, samplers, guidance, conditioners, and a U-Net.

A *schedule* gives the noise level of each time, and a *denoiser* estimates the clean image under a schedule. A
*sampler* takes noise to images along a *grid* of times, and *guidance* is a denoiser around denoisers. A *conditioner*
turns a condition, which is a node of a tree with its latents or image, into inputs of the *U-Net*.
"""

from treediff.diffusion.condition import NodeIndex, TreeCondition
from treediff.diffusion.conditioners import (
    Conditioner,
    Conditioners,
    LatentEmbedding,
    LeafWeightsEmbedding,
    NodeEmbedding,
    PathEncoder,
    PathTokens,
    ReconstructionConcat,
    Signal,
)
from treediff.diffusion.denoiser import Denoiser, Progress
from treediff.diffusion.discrete import DiscreteSchedule, rescale_zero_terminal_snr
from treediff.diffusion.grids import karras, quadratic, trailing, uniform
from treediff.diffusion.guidance import ClippedDenoiser, GuidedDenoiser
from treediff.diffusion.parameterization import as_noise, as_x0, target
from treediff.diffusion.samplers import (
    DDIMSampler,
    DDPMSampler,
    DPMSolver3Sampler,
    DPMSolverSampler,
    HeunSampler,
    Sampler,
)
from treediff.diffusion.schedule import (
    CosineSchedule,
    CustomSchedule,
    LinearSchedule,
    NoiseSchedule,
    ScaledLinearSchedule,
    SigmoidSchedule,
)
from treediff.diffusion.unet import UNet
from treediff.diffusion.weighting import min_snr, simple

__all__ = [
    "ClippedDenoiser",
    "Conditioner",
    "Conditioners",
    "CosineSchedule",
    "CustomSchedule",
    "DDIMSampler",
    "DDPMSampler",
    "DPMSolver3Sampler",
    "DPMSolverSampler",
    "Denoiser",
    "DiscreteSchedule",
    "GuidedDenoiser",
    "HeunSampler",
    "LatentEmbedding",
    "LeafWeightsEmbedding",
    "LinearSchedule",
    "NodeEmbedding",
    "NodeIndex",
    "NoiseSchedule",
    "PathEncoder",
    "PathTokens",
    "Progress",
    "ReconstructionConcat",
    "Sampler",
    "ScaledLinearSchedule",
    "SigmoidSchedule",
    "Signal",
    "TreeCondition",
    "UNet",
    "as_noise",
    "as_x0",
    "karras",
    "min_snr",
    "quadratic",
    "rescale_zero_terminal_snr",
    "simple",
    "target",
    "trailing",
    "uniform",
]
