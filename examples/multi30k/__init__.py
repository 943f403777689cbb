"""How the bundled English-to-German checkpoint was trained."""
