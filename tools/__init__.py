"""Programs for people who change this project; no wheel holds them."""
