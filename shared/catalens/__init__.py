"""The vocabulary of Catalens: what every service says the same way."""
