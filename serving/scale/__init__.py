"""More machines than one, by engines that exist; the only owner of Ray, the extra `serving[ray]`."""
