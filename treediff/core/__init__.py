"""Parts that both packages use: noise, files, model hubs, averages, modes, checks, groups of rows."""

__version__ = "0.1.0.dev0"
