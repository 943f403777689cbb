"""Offline stage: checkpoint -> module -> graphs -> bundle. Needs torch; serving never imports it."""
