"""The one form of a measurement: what a bench and an evaluation say, as JSON that is checked before anybody reads it."""
