"""Flow maps, rectified flow and step halving."""
