// Replays a plan.
#pragma once

#include <vector>

#include "../tensors.h"
#include "driver.h"
#include "plan.h"
#include "signature.h"

namespace prefixcore::launch {

// What `plan` computes from these arguments, of which `seen` was read: owned handles, one a result. `like` is on the
// device where all of it happens. Throws if something fails; nothing but its own memory has then been written.
std::vector<AtenTensorHandle> replay(const Plan& plan, const std::vector<Tensor>& arguments,
                                     const std::vector<Seen>& seen, const Tensor& like);

}  // namespace prefixcore::launch
