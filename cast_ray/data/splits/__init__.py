"""Which images keep their labels: label fractions and published lists."""
