"""Parts that both packages use: noise, files, model hubs, averages, modes, checks, groups of rows."""
