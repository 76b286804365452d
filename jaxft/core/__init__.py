"""What every other package stands on: axis legend, pytree algebra, statistics, input checks, random streams."""
