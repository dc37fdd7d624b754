"""Find the neurons that carry a class: paths, scores and the criteria that rank every neuron."""
