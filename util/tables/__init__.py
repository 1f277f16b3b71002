"""The paper's tables and grids of transfer learning. Imports train and what train may import."""
