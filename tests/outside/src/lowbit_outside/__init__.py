"""A method and an optimizer from outside: `method: {name: sign}` and `optimizer: {name: momentum}`."""
