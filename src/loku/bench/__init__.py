"""`loku bench`: a grid of methods, initialisers, settings and seeds, from a recipe to a leaderboard."""
