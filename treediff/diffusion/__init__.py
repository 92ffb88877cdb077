"""Diffusion models: schedules, denoisers, samplers, guidance, and the network they share."""
