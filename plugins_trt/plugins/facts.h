// facts.h: what the launchers ask of a device (kernels/device.h), read once a device.
#pragma once

#include "device.h"
#include "sentence.h"

namespace flashhead {

// Of the device that is current.
Sentence device_facts(fh_device& facts);

}  // namespace flashhead
