"""3D phase contrast from 4D-STEM: scattering-matrix phase retrieval and depth sectioning in JAX."""
