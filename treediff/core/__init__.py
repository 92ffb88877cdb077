"""Parts that both packages stand on: noise, files, model hubs, averages, modes, checks, groups of rows."""
